/*
 * Cases about sockets in several hands: threads, children, passed descriptors, io_uring, and many of them.
 */
#include "differ.h"
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

CASE_EACH(forked, "share.fork") {
  int fd = dial(on, ECHO);
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    say_names(fd);
    say("child: %s", converse(fd, "child"));
    _exit(0);
  }
  waitpid(child, NULL, 0);
  say("parent: %s", converse(fd, "parent"));
  int again = stream(on);
  child = fork();
  if (child == 0) _exit(connect_to(again, on, on->far, ECHO) < 0);
  int status = 1;
  waitpid(child, &status, 0);
  say("connected by a child: %d", WEXITSTATUS(status));
  say_names(again);
  say("parent: %s", converse(again, "inherited"));
}

CASE_EACH(duplicated, "share.dup") {
  int fd = dial(on, ECHO), copy = dup(fd);
  say("close: %s", result(close(fd)));
  say_names(copy);
  say("answer: %s", converse(copy, "hello"));
}

CASE_EACH(passed, "share.pass") {
  int pair[2], fd;
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) give_up("socketpair: %s", result(-1));
  char control[CMSG_SPACE(sizeof fd)] = {0}, byte = 'x';
  struct iovec part = {&byte, 1};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  pid_t child = fork();
  if (child == 0) {
    int made = dial(on, FIRST);
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof made), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &made, sizeof made);
    _exit(sendmsg(pair[0], &message, 0) != 1);
  }
  if (recvmsg(pair[1], &message, 0) != 1 || !CMSG_FIRSTHDR(&message)) give_up("recvmsg: %s", result(-1));
  memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
  waitpid(child, NULL, 0);
  say_names(fd);
  say("welcome: %s", receive(fd));
  say("answer: %s", converse(fd, "passed on"));
}

CASE_EACH(across_exec, "share.close-on-exec") {
  int fd = dial(on, SILENT);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  pid_t child = fork();
  if (child == 0) execlp("true", "true", NULL), _exit(9);
  waitpid(child, NULL, 0);
  send_all(fd, pattern, 10);
  close(fd);
  say("far: %s", far_saw(SILENT));
}

struct worker { const struct net *net; int done; pthread_t thread; };

static void *work(void *given) {
  struct worker *worker = given;
  for (int i = 0; i < 50; i++) {
    int fd = stream(worker->net);
    char said[40];
    snprintf(said, sizeof said, "\"number %d of %p\"", i, given);
    if (connect_to(fd, worker->net, worker->net->far, ECHO) == 0) {
      char *plain = strdup(said + 1);
      plain[strlen(plain) - 1] = 0;
      worker->done += !strcmp(converse(fd, plain), said);
      free(plain);
    }
    close(fd);
  }
  return NULL;
}

CASE_EACH(threads, "share.threads") {
  struct worker workers[16];
  int done = 0;
  for (int i = 0; i < 16; i++) {
    workers[i] = (struct worker){.net = on};
    pthread_create(&workers[i].thread, NULL, work, &workers[i]);
  }
  for (int i = 0; i < 16; i++) {
    pthread_join(workers[i].thread, NULL);
    done += workers[i].done;
  }
  say("answered: %d", done);
}

/* A thread that waits in recv while another ends the connection. */
static void *reader(void *given) { return (void *)receive(*(int *)given); }

CASE_EACH(shut_while_read, "share.shutdown-by-another-thread") {
  int fd = dial(on, SILENT);
  pthread_t thread;
  pthread_create(&thread, NULL, reader, &fd);
  pause_for(100);
  say("shutdown: %s", result(shutdown(fd, SHUT_RDWR)));
  void *received = NULL;
  pthread_join(thread, &received);
  say("received: %s", (char *)received);
}

CASE_EACH(thousands, "share.thousands-at-once") {
  enum { COUNT = 2000 };
  struct rlimit descriptors = {COUNT + 100, COUNT + 100};
  getrlimit(RLIMIT_NOFILE, &descriptors);
  if (descriptors.rlim_cur < COUNT + 100) descriptors.rlim_cur = COUNT + 100;
  if (setrlimit(RLIMIT_NOFILE, &descriptors) < 0) give_up("setrlimit: %s", result(-1));
  static int fds[COUNT];
  int connected = 0, answered = 0, ended = 0;
  for (int i = 0; i < COUNT; i++) {
    fds[i] = stream(on);
    connected += connect_to(fds[i], on, on->far, ECHO) == 0;
  }
  for (int i = 0; i < COUNT; i++) send(fds[i], &i, sizeof i, MSG_NOSIGNAL);
  for (int i = 0, got; i < COUNT; i++)
    answered += recv(fds[i], &got, sizeof got, MSG_WAITALL) == sizeof got && got == i;
  for (int i = 0; i < COUNT; i++) shutdown(fds[i], SHUT_WR);
  for (int i = 0, got; i < COUNT; i++) ended += recv(fds[i], &got, sizeof got, 0) == 0;
  say("connected %d, answered %d, ended %d", connected, answered, ended);
}

/* io_uring without a library: one submission at a time. */
static struct {
  int fd;
  unsigned *tail, *mask, *array, *done_head, *done_tail, *done_mask;
  struct io_uring_sqe *entries;
  struct io_uring_cqe *done;
} ring;

static void set_up_ring(void) {
  struct io_uring_params parameters = {0};
  ring.fd = syscall(SYS_io_uring_setup, 8, &parameters);
  if (ring.fd < 0) give_up("io_uring_setup: %s", result(-1));
  size_t size = parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned);
  size_t other = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
  int flags = MAP_SHARED | MAP_POPULATE, access = PROT_READ | PROT_WRITE;
  char *asked = mmap(NULL, size, access, flags, ring.fd, IORING_OFF_SQ_RING);
  char *answered = mmap(NULL, other, access, flags, ring.fd, IORING_OFF_CQ_RING);
  ring.entries = mmap(NULL, parameters.sq_entries * sizeof *ring.entries, access, flags, ring.fd, IORING_OFF_SQES);
  if (asked == MAP_FAILED || answered == MAP_FAILED || ring.entries == MAP_FAILED) give_up("mmap: %s", result(-1));
  ring.tail = (unsigned *)(asked + parameters.sq_off.tail);
  ring.mask = (unsigned *)(asked + parameters.sq_off.ring_mask);
  ring.array = (unsigned *)(asked + parameters.sq_off.array);
  ring.done_head = (unsigned *)(answered + parameters.cq_off.head);
  ring.done_tail = (unsigned *)(answered + parameters.cq_off.tail);
  ring.done_mask = (unsigned *)(answered + parameters.cq_off.ring_mask);
  ring.done = (struct io_uring_cqe *)(answered + parameters.cq_off.cqes);
}

/* As text: a value, or the error. */
static const char *submit(struct io_uring_sqe entry, int *value) {
  unsigned tail = *ring.tail, index = tail & *ring.mask;
  ring.entries[index] = entry;
  ring.array[index] = index;
  __atomic_store_n(ring.tail, tail + 1, __ATOMIC_RELEASE);
  if (syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0) return result(-1);
  unsigned head = *ring.done_head;
  if (head == __atomic_load_n(ring.done_tail, __ATOMIC_ACQUIRE)) return "no completion";
  int got = ring.done[head & *ring.done_mask].res;
  __atomic_store_n(ring.done_head, head + 1, __ATOMIC_RELEASE);
  if (value) *value = got;
  return got < 0 ? error_name(-got) : result(got);
}

CASE_EACH(uring, "share.io_uring") {
  set_up_ring();
  int fd = stream(on);
  struct sockaddr_storage to = at(on, on->far, ECHO);
  char bytes[20] = "";
  say("connect: %s", submit((struct io_uring_sqe){.opcode = IORING_OP_CONNECT, .fd = fd, .addr = (uintptr_t)&to,
                                                  .off = length_of(&to)}, NULL));
  say_names(fd);
  say("send: %s", submit((struct io_uring_sqe){.opcode = IORING_OP_SEND, .fd = fd, .addr = (uintptr_t)"hello",
                                               .len = 5}, NULL));
  const char *got = submit((struct io_uring_sqe){.opcode = IORING_OP_RECV, .fd = fd, .addr = (uintptr_t)bytes,
                                                 .len = 5, .msg_flags = MSG_WAITALL}, NULL);
  say("recv: %s %s", got, bytes);
  say("shutdown: %s", submit((struct io_uring_sqe){.opcode = IORING_OP_SHUTDOWN, .fd = fd, .len = SHUT_WR}, NULL));
  say("recv: %s", submit((struct io_uring_sqe){.opcode = IORING_OP_RECV, .fd = fd, .addr = (uintptr_t)bytes,
                                               .len = 5}, NULL));
  say("close: %s", submit((struct io_uring_sqe){.opcode = IORING_OP_CLOSE, .fd = fd}, NULL));
  say("far: %s", far_saw(ECHO));
}

static void *call(void *given) {
  (void)given;
  ask("call talk v4 10.77.0.1 %d", INBOUND);
  return NULL;
}

CASE(uring_accept, "in.io_uring") {
  set_up_ring();
  int at_home = listener(on, INBOUND), fd = -1;
  struct sockaddr_storage from = {0}, local = {0};
  socklen_t length = sizeof from;
  pthread_t thread;
  pthread_create(&thread, NULL, call, NULL);
  submit((struct io_uring_sqe){.opcode = IORING_OP_ACCEPT, .fd = at_home, .addr = (uintptr_t)&from,
                               .addr2 = (uintptr_t)&length}, &fd);
  say("accept: %s", fd < 0 ? error_name(-fd) : "a socket");
  length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  say("getsockname: %s", address_text(&local));
  say("received: %s", receive(fd));
  close(fd);
  pthread_join(thread, NULL);
  say("caller: %s", far_saw(0));
}
