/*
 * Cases in which the application is the server: the far end calls it (peer.c), on the port whose connections are redirected.
 */
#include "differ.h"

static pthread_t caller;
static char question[200];

static void *calling(void *given) {
  (void)given;
  ask("%s", question);
  return NULL;
}

/* The far end begins; it is waited for by said(). */
static void called(const struct net *on, const char *how) {
  snprintf(question, sizeof question, "call %s %s %s %d", how, on->name, on == &mapped ? v4.own : on->own, INBOUND);
  if (on == &mapped) snprintf(question, sizeof question, "call %s v4 %s %d", how, v4.own, INBOUND);
  pthread_create(&caller, NULL, calling, NULL);
}

static void said(void) {
  pthread_join(caller, NULL);
  say("caller: %s", far_saw(0));
}

static int accepted(int at_home) {
  int fd = accept(at_home, NULL, NULL);
  if (fd < 0) give_up("accept: %s", result(-1));
  limits(fd, 5);
  return fd;
}

CASE_EACH(names, "in.names") {
  int at_home = listener(on, INBOUND);
  say_names(at_home);
  called(on, "names");
  struct sockaddr_storage from = {0};
  socklen_t length = sizeof from;
  int fd = accept4(at_home, (struct sockaddr *)&from, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
  say("accept4: %s, length %u", fd < 0 ? result(-1) : "a socket", length);
  say("accepted from: %s", address_text(&from));
  struct sockaddr_storage local = {0}, peer = {0};
  length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  length = sizeof peer;
  getpeername(fd, (struct sockaddr *)&peer, &length);
  say("getsockname: %s", address_text(&local));
  say("peer: %s", memcmp(&peer, &from, length) ? address_text(&peer) : "as accepted");
  say_state(fd);
  say_error(fd);
  say("flags: %s, %s", fcntl(fd, F_GETFL) & O_NONBLOCK ? "nonblocking" : "blocking",
      fcntl(fd, F_GETFD) & FD_CLOEXEC ? "close-on-exec" : "kept");
  close(fd);
  said();
}

CASE_EACH(talks, "in.talk") {
  int at_home = listener(on, INBOUND);
  called(on, "talk");
  int fd = accepted(at_home);
  say("received: %s", receive(fd));
  send_all(fd, "answer", 6);
  close(fd);
  said();
}

CASE_EACH(speaks_first, "in.server-first") {
  int at_home = listener(on, INBOUND);
  called(on, "listen");
  int fd = accepted(at_home);
  say("send: %s", result(send_all(fd, "welcome", 7)));
  shutdown(fd, SHUT_WR);
  say("received: %s", read_text(fd));
  close(fd);
  said();
}

CASE_EACH(half, "in.half-close") {
  int at_home = listener(on, INBOUND);
  called(on, "half");
  int fd = accepted(at_home);
  say("received: %s", read_text(fd));
  say("readiness: %s", readiness(wait_for(fd, POLLRDHUP, 1000)));
  send_all(fd, "counted", 7);
  close(fd);
  said();
}

CASE_EACH(reset_by_caller, "in.reset-by-client") {
  int at_home = listener(on, INBOUND);
  called(on, "reset");
  int fd = accepted(at_home);
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 5000)));
  say("received: %s", read_text(fd));
  say_error(fd);
  said();
}

CASE_EACH(reset_by_server, "in.reset-by-server") {
  int at_home = listener(on, INBOUND);
  called(on, "talk");
  int fd = accepted(at_home);
  say("received: %s", receive(fd));
  struct linger none = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
  close(fd);
  said();
}

CASE_EACH(gone_at_once, "in.close-without-a-word") {
  int at_home = listener(on, INBOUND);
  called(on, "close");
  int fd = accepted(at_home);
  say("received: %s", read_text(fd));
  said();
}

CASE_EACH(server_closes, "in.close-by-server") {
  int at_home = listener(on, INBOUND);
  called(on, "late");
  close(accepted(at_home));
  said();
}

CASE_EACH(nobody_listens, "in.refused") {
  called(on, "talk");
  said();
}

CASE_EACH(bound_only, "in.bound-not-listening") {
  int fd = stream(on);
  say("bind: %s", result(bind_to(fd, on, on->any, INBOUND)));
  called(on, "talk");
  said();
  close(fd);
}

CASE_EACH(closed_with_pending, "in.listener-closed") {
  int at_home = listener(on, INBOUND);
  called(on, "talk");
  say("readiness: %s", readiness(wait_for(at_home, POLLIN, 5000)));
  close(at_home);
  said();
}

CASE_EACH(polled, "in.readiness") {
  int at_home = listener(on, INBOUND);
  nonblocking(at_home);
  say("accept: %s", result(accept(at_home, NULL, NULL)));
  say("readiness: %s", readiness(wait_for(at_home, 0, 0)));
  called(on, "talk");
  say("readiness: %s", readiness(wait_for(at_home, POLLIN, 5000)));
  int fd = accept(at_home, NULL, NULL);
  say("blocking: %s", fcntl(fd, F_GETFL) & O_NONBLOCK ? "no" : "yes");
  say("readiness: %s", readiness(wait_for(fd, POLLIN, 5000)));
  say("accept: %s", result(accept(at_home, NULL, NULL)));
  close(fd);
  said();
}

CASE_EACH(deferred, "in.TCP_DEFER_ACCEPT") {
  int at_home = listener(on, INBOUND);
  set(at_home, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5);
  called(on, "late");
  int fd = accepted(at_home);
  say("at once: %s", readiness(wait_for(fd, 0, 0)));
  say("received: %s", receive(fd));
  close(fd);
  said();
}

CASE_EACH(inherited, "in.options-inherited") {
  int at_home = listener(on, INBOUND);
  set(at_home, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(at_home, IPPROTO_TCP, TCP_NODELAY, 1);
  set(at_home, SOL_SOCKET, SO_MARK, 5);
  called(on, "talk");
  int fd = accepted(at_home);
  say("received: %s", receive(fd));
  say("keepalive %d, nodelay %d, mark %d", get(fd, SOL_SOCKET, SO_KEEPALIVE), get(fd, IPPROTO_TCP, TCP_NODELAY),
      get(fd, SOL_SOCKET, SO_MARK));
  close(fd);
  said();
}

CASE_EACH(urgent_data, "in.urgent") {
  int at_home = listener(on, INBOUND);
  called(on, "urgent");
  int fd = accepted(at_home);
  set(fd, SOL_SOCKET, SO_OOBINLINE, 1);
  say("readiness: %s", readiness(wait_for(fd, POLLRDHUP, 3000)));
  say("received: %s", read_text(fd));
  close(fd);
  said();
}

CASE_EACH(pushes, "in.upload") {
  int at_home = listener(on, INBOUND);
  called(on, "push");
  int fd = accepted(at_home);
  say("received: %s", read_pattern(fd));
  send_all(fd, "thanks", 6);
  close(fd);
  said();
}

CASE_EACH(pulls, "in.download") {
  int at_home = listener(on, INBOUND);
  called(on, "pull");
  int fd = accepted(at_home);
  say("sent: %s", result(send_pattern(fd, 16 << 20)));
  close(fd);
  said();
}

/* Two listeners of one port: each connection goes to one of them. */
CASE_EACH(shared, "in.SO_REUSEPORT") {
  int listeners[2];
  for (int i = 0; i < 2; i++) {
    listeners[i] = stream(on);
    set(listeners[i], SOL_SOCKET, SO_REUSEPORT, 1);
    set(listeners[i], SOL_SOCKET, SO_REUSEADDR, 1);
    if (bind_to(listeners[i], on, on->any, INBOUND) || listen(listeners[i], 10)) give_up("listen: %s", result(-1));
  }
  int served = 0;
  for (int i = 0; i < 10; i++) {
    called(on, "talk");
    struct pollfd both[2] = {{.fd = listeners[0], .events = POLLIN}, {.fd = listeners[1], .events = POLLIN}};
    poll(both, 2, 5000);
    int fd = accept(both[0].revents ? listeners[0] : listeners[1], NULL, NULL);
    served += !strcmp(receive(fd), "\"question\"");
    close(fd);
    pthread_join(caller, NULL);
  }
  say("served: %d", served);
}

/* A port without a rule, and one's own host, are as ever. */
CASE_EACH(within, "in.from-within") {
  int at_home = listener(on, INBOUND), fd = stream(on);
  const char *host = on == &v4 ? "127.0.0.1" : on == &v6 ? "::1" : "::ffff:127.0.0.1";
  say("connect: %s", result(connect_to(fd, on, host, INBOUND)));
  struct sockaddr_storage from = {0}, local = {0};
  socklen_t length = sizeof from;
  accept(at_home, (struct sockaddr *)&from, &length);
  length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  say("the same: %s", memcmp(&from, &local, length_of(&local)) ? address_text(&from) : "yes");
}

CASE_EACH(datagram, "in.udp") {
  int fd = datagrams(on);
  say("bind: %s", result(bind_to(fd, on, on->any, INBOUND)));
  struct sockaddr_storage to = at(on, on->far, ECHO), from = {0};
  socklen_t length = sizeof from;
  sendto(fd, "hello", 5, 0, (struct sockaddr *)&to, length_of(&to));
  char bytes[10] = "";
  long got = recvfrom(fd, bytes, 9, 0, (struct sockaddr *)&from, &length);
  say("received: %s %s from %s", result(got), bytes, address_text(&from));
}
