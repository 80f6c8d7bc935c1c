/*
 * Cases about the end of connections: half-close, close, reset, and what each side sees of it.
 */
#include "differ.h"

static void reset(int fd) {
  struct linger none = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
  close(fd);
}

CASE_EACH(half_here, "end.half-close-by-client") {
  int fd = dial(on, SINK);
  send_pattern(fd, 100000);
  say("shutdown: %s", result(shutdown(fd, SHUT_WR)));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("answer: %s", read_text(fd));
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 3000)));
  say_error(fd);
  say("shutdown after the end: %s", result(shutdown(fd, SHUT_WR)));
  say_names(fd);
  close(fd);
  say("far: %s", far_saw(SINK));
}

CASE_EACH(half_there, "end.half-close-by-server") {
  int fd = dial(on, HALF);
  say("received: %s", read_text(fd));
  say("readiness: %s", readiness(wait_for(fd, POLLRDHUP, 3000)));
  pause_for(100);
  say("send: %s", result(send_all(fd, "still here", 10)));
  close(fd);
  say("far: %s", far_saw(HALF));
}

CASE_EACH(closed_here, "end.close-by-client") {
  int fd = dial(on, SILENT);
  send_pattern(fd, 200000);
  close(fd);
  const char *far = far_saw(SILENT);
  say("far: %s", strstr(far, "200000"));
}

CASE_EACH(closed_at_once, "end.close-without-a-word") {
  for (int i = 0; i < 3; i++) close(dial(on, SILENT));
  for (int i = 0; i < 3; i++) say("far: %s", far_saw(SILENT));
}

CASE_EACH(closed_unread, "end.close-with-unread-data") {
  int fd = dial(on, FIRST);
  wait_for(fd, POLLIN, 3000);
  close(fd);
  say("far: %s", far_saw(FIRST));
}

CASE_EACH(reset_here, "end.reset-by-client") {
  int fd = dial(on, ECHO);
  say("answer: %s", converse(fd, "hello"));
  reset(fd);
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(reset_unspec, "end.reset-by-disconnect") {
  int fd = dial(on, ECHO);
  say("answer: %s", converse(fd, "hello"));
  struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
  say("disconnect: %s", result(connect(fd, &nowhere, sizeof nowhere)));
  say("far: %s", far_saw(ECHO));
}

static void after_reset(int fd) {
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 5000)));
  say("received: %s", read_text(fd));
  say("once more: %s", receive(fd));
  say_error(fd);
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say_names(fd);
  say("shutdown: %s", result(shutdown(fd, SHUT_RDWR)));
}

CASE_EACH(reset_at_once, "end.reset-at-accept") { after_reset(dial(on, RESET)); }

CASE_EACH(reset_later, "end.reset-after-bytes") {
  int fd = dial(on, RESET_AFTER);
  say("received: %s", read_pattern(fd));
  say_error(fd);
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 3000)));
}

CASE_EACH(reset_on_data, "end.reset-on-data") {
  int fd = dial(on, RESET_ON_DATA);
  say("before: %s", readiness(wait_for(fd, 0, 0)));
  send_all(fd, "x", 1);
  after_reset(fd);
}

CASE_EACH(reset_asked, "end.reset-told-by-SO_ERROR") {
  int fd = dial(on, RESET_ON_DATA);
  send_all(fd, "x", 1);
  wait_for(fd, POLLHUP, 5000);
  say_error(fd);
  say_error(fd);
  say("received: %s", receive(fd));
}

CASE_EACH(reset_while_reading, "end.reset-while-reading") {
  int fd = dial(on, RESET_ON_DATA);
  send_all(fd, "x", 1);
  say("received: %s", receive(fd));
}

CASE_EACH(reset_while_writing, "end.reset-while-writing") {
  int fd = dial(on, RESET_ON_DATA);
  long sent = send_pattern(fd, 1 << 30);
  say("send: %s", sent < 0 && (errno == EPIPE || errno == ECONNRESET) ? "failed" : result(sent));
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 3000)));
}

CASE_EACH(refusal, "end.answer-before-reset") {
  int fd = dial(on, UNREAD);
  send_pattern(fd, 100000);
  say("received: %s", read_text(fd));
}

CASE_EACH(closed_there, "end.close-by-server") {
  int fd = dial(on, CLOSE);
  say("readiness: %s", readiness(wait_for(fd, POLLRDHUP, 3000)));
  say("received: %s", receive(fd));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 3000)));
  say_error(fd);
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("received: %s", receive(fd));
}

CASE_EACH(orders, "end.shutdown-orders") {
  int fd = stream(on);
  say("unconnected: %s", result(shutdown(fd, SHUT_RDWR)));
  fd = dial(on, ECHO);
  say("read: %s", result(shutdown(fd, SHUT_RD)));
  say("received: %s", receive(fd));
  say("readiness: %s", readiness(wait_for(fd, POLLIN, 1000)));
  say("send: %s", result(send_all(fd, "hello", 5)));
  say("write: %s", result(shutdown(fd, SHUT_WR)));
  say("far: %s", far_saw(ECHO));
  fd = dial(on, ECHO);
  say("both: %s", result(shutdown(fd, SHUT_RDWR)));
  say("received: %s", receive(fd));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 3000)));
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(lingering, "end.linger") {
  int fd = dial(on, SILENT);
  struct linger wait = {1, 5};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &wait, sizeof wait);
  send_pattern(fd, 50000);
  struct timespec begun, done;
  clock_gettime(CLOCK_MONOTONIC, &begun);
  say("close: %s", result(close(fd)));
  clock_gettime(CLOCK_MONOTONIC, &done);
  say("within 4 s: %s", done.tv_sec - begun.tv_sec < 4 ? "yes" : "no");
  say("far: %s", strstr(far_saw(SILENT), "50000"));
}

CASE_EACH(broken_pipe, "end.SIGPIPE") {
  int fd = dial(on, CLOSE);
  wait_for(fd, POLLRDHUP, 3000);
  send(fd, "x", 1, MSG_NOSIGNAL);
  wait_for(fd, POLLHUP, 3000);
  signal(SIGPIPE, SIG_DFL);
  say("send: %s", result(send(fd, "x", 1, 0)));
}

/* The far end is gone without a word, with data on its way. */
static void vanish(const struct net *on) {
  int fd = stream(on);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 700);
  say("connect: %s", result(connect_to(fd, on, on->far_vanishing, ECHO)));
  say("answer: %s", converse(fd, "hello"));
  say("vanish: %s", ask("vanish"));
  send_all(fd, "lost", 4);
  bool told = wait_for(fd, POLLHUP, 3000) & POLLHUP;
  const char *error = error_name(get(fd, SOL_SOCKET, SO_ERROR));
  say("appear: %s", ask("appear"));
  say("told within 3 s: %s", told ? error : "no");
}

CASE(vanished4, "end.vanished/v4") { vanish(on); }
CASE_ON(vanished6, "end.vanished/v6", &v6) { vanish(on); }
