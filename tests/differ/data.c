/*
 * Cases about bytes: ways to send and to receive them, amounts, order.
 */
#include "differ.h"
#include <linux/errqueue.h>
#include <sys/mman.h>
#include <sys/sendfile.h>

struct sending { int fd; uint64_t length; };

static void *sender(void *given) {
  struct sending *sending = given;
  send_pattern(sending->fd, sending->length);
  shutdown(sending->fd, SHUT_WR);
  return NULL;
}

static const char *echo(const struct net *on, uint64_t length) {
  struct sending sending = {dial(on, ECHO), length};
  pthread_t thread;
  pthread_create(&thread, NULL, sender, &sending);
  const char *got = read_pattern(sending.fd);
  pthread_join(thread, NULL);
  close(sending.fd);
  return got;
}

CASE_EACH(amounts, "data.amounts") {
  static const uint64_t lengths[] = {0, 1, 1447, 65535, 65536, 131072, 131073, 1 << 20, 20 << 20};
  for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) say("echo: %s", echo(on, lengths[i]));
}

static const char *pull(const struct net *on, uint64_t length) {
  int fd = dial(on, SOURCE);
  send_all(fd, &length, 8);
  const char *got = read_pattern(fd);
  close(fd);
  return got;
}

CASE_EACH(download, "data.download") {
  say("received: %s", pull(on, 64 << 10));
  say("received: %s", pull(on, 100 << 20));
}

CASE_EACH(upload, "data.upload") {
  int fd = dial(on, SINK);
  say("sent: %s", result(send_pattern(fd, 100 << 20)));
  say("shutdown: %s", result(shutdown(fd, SHUT_WR)));
  say("answer: %s", read_text(fd));
  close(fd);
  say("far: %s", far_saw(SINK));
}

CASE(gibibyte, "data.gibibyte") { say("received: %s", pull(on, 1 << 30)); }

CASE_EACH(first, "data.server-first") {
  int fd = dial(on, FIRST);
  say("readiness: %s", readiness(wait_for(fd, POLLIN, 5000)));
  say("received: %s", receive(fd));
  say("answer: %s", converse(fd, "and then"));
}

CASE_EACH(slow, "data.slow-reader") {
  int fd = dial(on, SLOW);
  nonblocking(fd);
  uint64_t sent = 0;
  for (long now; (now = send(fd, pattern + sent % PATTERN, PATTERN, MSG_NOSIGNAL)) > 0;) sent += now;
  say("send: %s", result(-1));
  say("readiness: %s", readiness(wait_for(fd, 0, 0)));
  say("writable again: %s", readiness(wait_for(fd, POLLOUT, 5000)));
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
  char far[200], wanted[200];
  close(fd);
  snprintf(far, sizeof far, "%s", far_saw(SLOW));
  snprintf(wanted, sizeof wanted, "%llu right bytes, then the end", (unsigned long long)sent);
  say("far: %s", strcmp(far, wanted) ? far : "all of it");
}

CASE_EACH(file, "data.sendfile") {
  int fd = dial(on, SINK), from = memfd_create("data", 0);
  for (int i = 0; i < 4; i++) say("write: %s", result(write(from, pattern, PATTERN)));
  off_t offset = 0;
  while (offset < 4 * PATTERN && sendfile(fd, from, &offset, 4 * PATTERN - offset) > 0) {}
  say("sendfile up to: %lld", (long long)offset);
  shutdown(fd, SHUT_WR);
  say("answer: %s", read_text(fd));
}

CASE_EACH(through_pipe, "data.splice") {
  int out = dial(on, SINK), pipe_out[2], pipe_in[2];
  if (pipe(pipe_out) || pipe(pipe_in)) give_up("pipe: %s", result(-1));
  uint64_t sent = 0;
  while (sent < PATTERN) {
    long in = write(pipe_out[1], pattern + sent, 32 << 10);
    while (in > 0) {
      long now = splice(pipe_out[0], NULL, out, NULL, in, SPLICE_F_MOVE | SPLICE_F_MORE);
      if (now <= 0) give_up("splice out: %s", result(now));
      in -= now, sent += now;
    }
  }
  shutdown(out, SHUT_WR);
  say("answer: %s", read_text(out));

  int in = dial(on, SOURCE);
  uint64_t wanted = PATTERN, got = 0;
  send_all(in, &wanted, 8);
  char *bytes = malloc(64 << 10);
  bool exact = true;
  for (long now; (now = splice(in, NULL, pipe_in[1], NULL, 64 << 10, SPLICE_F_MOVE)) > 0; got += now)
    for (long taken = 0; taken < now;) {
      long part = read(pipe_in[0], bytes, now - taken);
      exact &= is_pattern(bytes, part, got + taken);
      taken += part;
    }
  say("spliced in: %llu %s bytes", (unsigned long long)got, exact ? "right" : "WRONG");
}

CASE_EACH(zerocopy, "data.zerocopy") {
  int fd = dial(on, SINK);
  set(fd, SOL_SOCKET, SO_ZEROCOPY, 1);
  for (int i = 0; i < 8; i++)
    if (send(fd, pattern, 64 << 10, MSG_ZEROCOPY) != 64 << 10) give_up("send: %s", result(-1));
  /* Notifications may come together; what counts is that each send is told of. */
  unsigned told = 0;
  for (int waited = 0; told < 8 && waited < 5000; waited += 5) {
    char control[200];
    struct msghdr message = {.msg_control = control, .msg_controllen = sizeof control};
    if (recvmsg(fd, &message, MSG_ERRQUEUE) < 0) {
      pause_for(5);
      continue;
    }
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    struct sock_extended_err *error = head ? (struct sock_extended_err *)CMSG_DATA(head) : NULL;
    if (error && error->ee_origin == SO_EE_ORIGIN_ZEROCOPY) told += error->ee_data - error->ee_info + 1;
  }
  say("completions: %u", told);
  shutdown(fd, SHUT_WR);
  const char *expected = "\"524288 WRONG bytes\", then the end"; /* the pattern's beginning, eight times */
  const char *answer = read_text(fd);
  say("answer: %s", strcmp(answer, expected) ? answer : "as sent");
}

CASE_EACH(received_ways, "data.receive-flags") {
  int fd = dial(on, ECHO);
  char bytes[100] = "";
  say("DONTWAIT: %s", result(recv(fd, bytes, 10, MSG_DONTWAIT)));
  send_all(fd, "0123456789", 10);
  say("WAITALL|PEEK: %s", result(recv(fd, bytes, 10, MSG_WAITALL | MSG_PEEK)));
  int waiting = 0;
  ioctl(fd, FIONREAD, &waiting);
  say("FIONREAD: %d", waiting);
  say("PEEK: %s %.4s", result(recv(fd, bytes, 4, MSG_PEEK)), bytes);
  set(fd, SOL_SOCKET, SO_PEEK_OFF, 3);
  say("PEEK at 3: %s %.2s", result(recv(fd, bytes, 2, MSG_PEEK)), bytes);
  say("TRUNC: %s", result(recv(fd, NULL, 2, MSG_TRUNC)));
  say("WAITALL: %s %.8s", result(recv(fd, bytes, 8, MSG_WAITALL)), bytes);
  set(fd, SOL_SOCKET, SO_RCVLOWAT, 5);
  send_all(fd, "abc", 3);
  say("below RCVLOWAT: %s", readiness(wait_for(fd, POLLIN, 200)));
  send_all(fd, "def", 3);
  say("above RCVLOWAT: %s", readiness(wait_for(fd, POLLIN, 3000)));
  struct timeval limit = {0, 200000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  say("six: %s", result(recv(fd, bytes, 6, MSG_WAITALL)));
  say("SO_RCVTIMEO: %s", result(recv(fd, bytes, 6, 0)));
}

CASE_EACH(messages, "data.messages") {
  int fd = dial(on, ECHO);
  char one[8] = "one", two[8] = "two", got[3][20] = {"", "", ""};
  struct iovec parts[] = {{one, 3}, {two, 3}};
  struct mmsghdr many[] = {{{.msg_iov = &parts[0], .msg_iovlen = 1}, 0}, {{.msg_iov = parts, .msg_iovlen = 2}, 0}};
  say("sendmmsg: %s", result(sendmmsg(fd, many, 2, 0)));
  say("writev: %s", result(writev(fd, parts, 2)));
  set(fd, IPPROTO_TCP, TCP_CORK, 1);
  say("corked: %s", result(send(fd, "cork", 4, MSG_MORE)));
  set(fd, IPPROTO_TCP, TCP_CORK, 0);
  set(fd, IPPROTO_TCP, TCP_INQ, 1);
  recv(fd, got, 1, MSG_WAITALL | MSG_PEEK);
  for (int waited = 0, there = 0; there < 19 && waited < 5000; waited += 5) {
    ioctl(fd, FIONREAD, &there);
    pause_for(5);
  }
  struct sockaddr_storage from;
  char control[200];
  struct iovec into = {got, 15};
  struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &into, .msg_iovlen = 1,
                           .msg_control = control, .msg_controllen = sizeof control};
  long received = recvmsg(fd, &message, 0);
  say("recvmsg: %s %.15s, name %u, flags %x", result(received), (char *)got, message.msg_namelen, message.msg_flags);
  for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head))
    say("ancillary: level %d, type %d, %d", head->cmsg_level, head->cmsg_type, *(int *)CMSG_DATA(head));
  say("rest: %s", receive(fd));
  struct sockaddr_storage other = at(on, on->far, FIRST);
  say("sendto elsewhere: %s", result(sendto(fd, "to", 2, 0, (struct sockaddr *)&other, length_of(&other))));
  say("received: %s", receive(fd));
}

CASE_EACH(outqueue, "data.outqueue") {
  int fd = dial(on, SILENT), left = 1;
  send_all(fd, "hello", 5);
  for (int waited = 0; left && waited < 3000; waited += 5) ioctl(fd, TIOCOUTQ, &left), pause_for(5);
  say("acknowledged: %s", left ? "no" : "yes");
}

CASE_EACH(fast, "data.fastopen") {
  /* The first has no cookie yet. */
  for (int i = 0; i < 2; i++) {
    int fd = stream(on);
    struct sockaddr_storage to = at(on, on->far, ECHO);
    say("sendto: %s", result(sendto(fd, "early", 5, MSG_FASTOPEN, (struct sockaddr *)&to, length_of(&to))));
    say_names(fd);
    say("received: %s", receive(fd));
    say("answer: %s", converse(fd, "more"));
    close(fd);
    fd = stream(on);
    set(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1);
    say("deferred connect: %s", result(connect_to(fd, on, on->far, ECHO)));
    say("answer: %s", converse(fd, "early"));
    say_names(fd);
    close(fd);
  }
}

CASE_EACH(fast_refused, "data.fastopen-refused") {
  int fd = stream(on);
  struct sockaddr_storage to = at(on, on->far, NOBODY);
  long sent = sendto(fd, "early", 5, MSG_FASTOPEN, (struct sockaddr *)&to, length_of(&to));
  const char *first = result(sent);
  say("sendto: %s", first);
  say("in the end: %s", sent < 0 ? first : receive(fd));
}

CASE_EACH(urgent_data, "data.urgent") {
  int fd = dial(on, URGENT);
  char byte = '?';
  say("none yet: %s", result(recv(fd, &byte, 1, MSG_OOB)));
  send_all(fd, "ab", 2);
  say("send: %s", result(send(fd, "!", 1, MSG_OOB)));
  pause_for(50);
  send_all(fd, "cd", 2);
  pause_for(50);
  shutdown(fd, SHUT_WR);
  say("readiness: %s", readiness(wait_for(fd, POLLPRI, 3000)));
  const char *got = result(recv(fd, &byte, 1, MSG_OOB));
  say("urgent: %s %c", got, byte);
  say("received: %s", read_text(fd));
  say("far: %s", far_saw(URGENT));
}
