/*
 * Cases about readiness: poll(2) is in most others; here are select(2), epoll(7) and their edges.
 */
#include "differ.h"
#include <sys/epoll.h>
#include <sys/select.h>

static const char *event(int epoll, int milliseconds) {
  struct epoll_event event = {0};
  int got = epoll_wait(epoll, &event, 1, milliseconds);
  return got == 1 ? readiness(event.events) : result(got);
}

static void watch(int epoll, int fd, unsigned events, int how) {
  struct epoll_event event = {.events = events};
  if (epoll_ctl(epoll, how, fd, &event) < 0) say("epoll_ctl: %s", result(-1));
}

CASE_EACH(edges, "ready.epoll-edges") {
  int fd = stream(on), epoll = epoll_create1(0);
  nonblocking(fd);
  watch(epoll, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, EPOLL_CTL_ADD);
  say("fresh: %s", event(epoll, 100));
  say("again: %s", event(epoll, 50));
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("connected: %s", event(epoll, 3000));
  say("again: %s", event(epoll, 50));
  send_all(fd, "hello", 5);
  /* An acknowledgement may come before the answer. */
  say("answered: %s", readiness(wait_for(fd, POLLIN, 3000)));
  say("edge: %s", event(epoll, 1000));
  char bytes[10];
  say("received: %s", result(recv(fd, bytes, 10, 0)));
  say("empty: %s", result(recv(fd, bytes, 10, 0)));
  shutdown(fd, SHUT_WR);
  wait_for(fd, POLLHUP, 3000);
  say("ended: %s", event(epoll, 1000));
  say("again: %s", event(epoll, 50));
}

CASE_EACH(levels, "ready.epoll-levels") {
  int fd = dial(on, FIRST), epoll = epoll_create1(0);
  watch(epoll, fd, EPOLLIN | EPOLLRDHUP | EPOLLPRI, EPOLL_CTL_ADD);
  say("first: %s", event(epoll, 3000));
  say("still: %s", event(epoll, 50));
  say("received: %s", receive(fd));
  say("empty: %s", event(epoll, 50));
  watch(epoll, fd, EPOLLIN | EPOLLOUT | EPOLLONESHOT, EPOLL_CTL_MOD);
  say("once: %s", event(epoll, 1000));
  say("no more: %s", event(epoll, 50));
  watch(epoll, fd, EPOLLIN | EPOLLONESHOT, EPOLL_CTL_MOD);
  say("armed: %s", event(epoll, 50));
  send_all(fd, "x", 1);
  say("answered: %s", event(epoll, 3000));
  watch(epoll, fd, 0, EPOLL_CTL_MOD);
  shutdown(fd, SHUT_WR);
  say("ended, nothing wanted: %s", event(epoll, 3000));
}

CASE_EACH(reset_edges, "ready.epoll-reset") {
  int fd = dial(on, RESET_ON_DATA), epoll = epoll_create1(0);
  watch(epoll, fd, EPOLLIN | EPOLLRDHUP | EPOLLET, EPOLL_CTL_ADD);
  say("before: %s", event(epoll, 50));
  send_all(fd, "x", 1);
  say("reset: %s", event(epoll, 3000));
  say("again: %s", event(epoll, 50));
  say("received: %s", receive(fd));
}

CASE_EACH(selected, "ready.select") {
  int fd = dial(on, FIRST);
  for (int round = 0; round < 3; round++) {
    fd_set in, out, exception;
    FD_ZERO(&in);
    FD_ZERO(&out);
    FD_ZERO(&exception);
    FD_SET(fd, &in);
    FD_SET(fd, &out);
    FD_SET(fd, &exception);
    if (round != 1) wait_for(fd, POLLIN, 3000);
    struct timeval limit = {0, 100000};
    int got = select(fd + 1, &in, &out, &exception, &limit);
    say("select %s: in %d, out %d, exception %d", result(got), FD_ISSET(fd, &in) != 0, FD_ISSET(fd, &out) != 0,
        FD_ISSET(fd, &exception) != 0);
    if (round == 0) say("received: %s", receive(fd));
    if (round == 1) shutdown(fd, SHUT_WR);
  }
}

CASE_EACH(unconnected, "ready.unconnected") {
  int fd = stream(on);
  char byte;
  say("fresh: %s", readiness(wait_for(fd, 0, 0)));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("recv: %s", result(recv(fd, &byte, 1, 0)));
  say_error(fd);
}

/* A handler for SIGALRM without SA_RESTART interrupts a read and a connect. */
static void ignore(int number) { (void)number; }

CASE_EACH(interrupted, "ready.interrupted") {
  int fd = dial(on, SILENT);
  struct sigaction action = {.sa_handler = ignore};
  limits(fd, 0);
  sigaction(SIGALRM, &action, NULL);
  alarm(1);
  char byte;
  say("recv: %s", result(recv(fd, &byte, 1, 0)));
}

CASE_EACH(signalled, "ready.SIGIO") {
  sigset_t wanted;
  sigemptyset(&wanted);
  sigaddset(&wanted, SIGRTMIN);
  sigprocmask(SIG_BLOCK, &wanted, NULL);
  int fd = dial(on, ECHO);
  fcntl(fd, F_SETOWN, getpid());
  fcntl(fd, F_SETSIG, SIGRTMIN);
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC);
  send_all(fd, "x", 1);
  struct timespec limit = {3, 0};
  siginfo_t info = {0};
  int signal;
  do signal = sigtimedwait(&wanted, &info, &limit);
  while (signal == SIGRTMIN && !(info.si_band & POLLIN));
  say("told of input: %s", signal == SIGRTMIN && info.si_fd == fd ? "yes" : result(signal));
}
