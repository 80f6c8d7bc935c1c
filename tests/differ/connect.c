/*
 * Cases about connect(2) and names.
 */
#include "differ.h"
#include <net/if.h>
#include <sys/un.h>

CASE_EACH(blocking, "connect.blocking") {
  int fd = stream(on);
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say_error(fd);
  say_state(fd);
  say("again: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("elsewhere: %s", result(connect_to(fd, on, on->far, FIRST)));
  say("answer: %s", converse(fd, "hello"));
  struct sockaddr_storage peer = {0};
  socklen_t length = length_of(&(struct sockaddr_storage){.ss_family = on->family});
  long had = getsockopt(fd, SOL_SOCKET, SO_PEERNAME, &peer, &length);
  say("SO_PEERNAME: %s", had < 0 ? result(had) : address_text(&peer));
  say("SO_DOMAIN %d, SO_TYPE %d, SO_PROTOCOL %d, SO_ACCEPTCONN %d", get(fd, SOL_SOCKET, SO_DOMAIN),
      get(fd, SOL_SOCKET, SO_TYPE), get(fd, SOL_SOCKET, SO_PROTOCOL), get(fd, SOL_SOCKET, SO_ACCEPTCONN));
  struct sockaddr_storage cut;
  memset(&cut, 0xee, sizeof cut);
  length = 4;
  had = getpeername(fd, (struct sockaddr *)&cut, &length);
  say("cut: %s, length %u, port %d", result(had), length, port_of(&cut));
  close(fd);
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(without_blocking, "connect.nonblocking") {
  int fd = stream(on);
  nonblocking(fd);
  say("before: %s", readiness(wait_for(fd, 0, 0)));
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("then: %s", readiness(wait_for(fd, POLLOUT, 5000)));
  say_error(fd);
  say_names(fd);
  say("second: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("third: %s", result(connect_to(fd, on, on->far, ECHO)));
  char byte;
  say("nothing there: %s", result(recv(fd, &byte, 1, 0)));
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
  say("answer: %s", converse(fd, "hello"));
}

/* What is refused, unreachable or prohibited: by the call itself, or by what follows. */
static void failing(const struct net *on, const char *host, int port) {
  int fd = stream(on);
  limits(fd, 6);
  long connected = connect_to(fd, on, host, port);
  const char *first = result(connected);
  say("connect: %s", first);
  say("in the end: %s", connected < 0 ? first : receive(fd));
  say_error(fd);
  say("after: %s", readiness(wait_for(fd, POLLHUP, 2000)));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  close(fd);

  fd = stream(on);
  nonblocking(fd);
  connected = connect_to(fd, on, host, port);
  say("nonblocking connect: %s", result(connected));
  long ready = wait_for(fd, POLLHUP, 6000);
  say("nonblocking then: %s", readiness(ready));
  say("nonblocking SO_ERROR: %s", error_name(get(fd, SOL_SOCKET, SO_ERROR)));
  close(fd);
}

CASE_EACH(refused, "connect.refused") { failing(on, on->far, NOBODY); }
CASE_EACH(unreachable, "connect.unreachable") { failing(on, on->unreachable, ECHO); }
CASE_EACH(prohibited, "connect.prohibited") { failing(on, on->prohibited, ECHO); }
CASE_EACH(multicast, "connect.multicast") { failing(on, on->multicast, ECHO); }
CASE(broadcast, "connect.broadcast") { failing(on, "255.255.255.255", ECHO); }
CASE(port_zero, "connect.port-zero") { failing(on, on->far, 0); }
CASE_EACH(loopback, "connect.loopback") {
  const char *host = on == &v4 ? "127.0.0.1" : on == &v6 ? "::1" : "::ffff:127.0.0.1";
  failing(on, host, NOBODY);
}
CASE_EACH(unspecified, "connect.unspecified") { failing(on, on == &mapped ? "::ffff:0.0.0.0" : on->any, NOBODY); }

/* Nothing answers. A limit on the connect is the application's own. */
static void unanswered(const struct net *on) {
  int fd = stream(on);
  struct timeval limit = {0, 300000};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  long connected = connect_to(fd, on, on->silent, ECHO);
  say("connect: %s", result(connected));
  say("SO_ERROR after: %s", error_name(get(fd, SOL_SOCKET, SO_ERROR)));
  close(fd);
  fd = stream(on);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 500);
  set(fd, IPPROTO_TCP, TCP_SYNCNT, 1);
  struct timeval long_limit = {2, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &long_limit, sizeof long_limit);
  connected = connect_to(fd, on, on->silent, ECHO);
  const char *first = result(connected);
  say("with TCP_SYNCNT: %s", first);
  say("in the end: %s", connected < 0 ? first : receive(fd));
}

CASE(unanswered4, "connect.timeout/v4") { unanswered(on); }
CASE_ON(unanswered6, "connect.timeout/v6", &v6) { unanswered(on); }

CASE(full, "connect.backlog-full") {
  int fd = stream(on);
  limits(fd, 1);
  say("connect: %s", result(connect_to(fd, on, on->far, FULL)));
  say("in the end: %s", receive(fd));
}

CASE_EACH(wrong_family, "connect.wrong-address") {
  const struct net *other = on == &v4 ? &v6 : &v4;
  int fd = stream(on);
  struct sockaddr_storage address = at(other, other->far, ECHO);
  say("other family: %s", result(connect(fd, (struct sockaddr *)&address, sizeof(struct sockaddr_in6))));
  say_names(fd);
  address = at(on, on->far, ECHO);
  say("short: %s", result(connect(fd, (struct sockaddr *)&address, 8)));
  struct sockaddr_un local = {AF_UNIX, "/nowhere"};
  say("unix: %s", result(connect(fd, (struct sockaddr *)&local, sizeof local)));
  say_names(fd);
  say("right: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
}

CASE_ON(link_local, "connect.link-local", &v6) {
  int fd = stream(on);
  struct sockaddr_storage to = at(on, "fe80::77:2", ECHO);
  ((struct sockaddr_in6 *)&to)->sin6_scope_id = if_nametoindex("far");
  long connected = connect(fd, (struct sockaddr *)&to, length_of(&to));
  say("connect: %s", result(connected));
  say("answer: %s", connected < 0 ? "-" : converse(fd, "hello"));
}

/* To an address of one's own that is not loopback: the server sees the client's own socket. */
CASE_EACH(own, "connect.own-address") {
  int at_home = listener(on, ASIDE), fd = stream(on);
  say("connect: %s", result(connect_to(fd, on, on->own, ASIDE)));
  struct sockaddr_storage from = {0}, local = {0};
  socklen_t length = sizeof from;
  int accepted = accept(at_home, (struct sockaddr *)&from, &length);
  length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  say("accepted from: %s", accepted < 0 ? result(-1) : address_text(&from));
  say("connected from: %s", address_text(&local));
  say("the same port: %s", port_of(&from) == port_of(&local) ? "yes" : "no");
  send_all(accepted, "hello", 5);
  close(accepted);
  say("received: %s", read_text(fd));
}

CASE_EACH(itself, "connect.to-itself") {
  int fd = stream(on);
  set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  say("bind: %s", result(bind_to(fd, on, on->own, port_for(on, 21050))));
  limits(fd, 2);
  long connected = connect_to(fd, on, on->own, port_for(on, 21050));
  say("connect: %s", result(connected));
  say("answer: %s", connected < 0 ? "-" : converse(fd, "hello"));
}

static long disconnect(int fd) {
  struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
  return connect(fd, &nowhere, sizeof nowhere);
}

CASE_EACH(reconnect, "connect.unspec") {
  int fd = dial(on, ECHO);
  say("answer: %s", converse(fd, "one"));
  say("disconnect: %s", result(disconnect(fd)));
  say_names(fd);
  say_state(fd);
  say("readiness: %s", readiness(wait_for(fd, POLLHUP, 1000)));
  say("send: %s", result(send(fd, "x", 1, MSG_NOSIGNAL)));
  say("connect: %s", result(connect_to(fd, on, on->far, FIRST)));
  say_names(fd);
  say("welcome: %s", receive(fd));
  say("disconnect: %s", result(disconnect(fd)));
  say("once more: %s", result(disconnect(fd)));
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("answer: %s", converse(fd, "three"));
}

CASE_EACH(bind_again, "connect.unspec-then-bind") {
  int fd = dial(on, ECHO);
  limits(fd, 2);
  say("disconnect: %s", result(disconnect(fd)));
  say("bind: %s", result(bind_to(fd, on, on->own, port_for(on, 21060))));
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  disconnect(fd);
}

CASE_EACH(listen_again, "connect.unspec-then-listen") {
  int fd = dial(on, ECHO);
  say("disconnect: %s", result(disconnect(fd)));
  say("listen: %s", result(listen(fd, 5)));
  struct sockaddr_storage local = {0};
  socklen_t length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  say_names(fd);
  int client = stream(on);
  const char *host = on == &v4 ? "127.0.0.1" : on == &v6 ? "::1" : "::ffff:127.0.0.1";
  say("connect: %s", result(connect_to(client, on, host, port_of(&local))));
}

CASE_EACH(twice_from_one, "connect.after-refused") {
  int fd = stream(on);
  long connected = connect_to(fd, on, on == &v4 ? "127.0.0.1" : on == &v6 ? "::1" : "::ffff:127.0.0.1", NOBODY);
  say("local: %s", result(connected));
  say("far: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
}

CASE_EACH(bound, "bound.address-and-port") {
  int fd = stream(on);
  say("bind: %s", result(bind_to(fd, on, on->own, port_for(on, 21000))));
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  close(fd);
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(bound_other, "bound.other-address") {
  int fd = stream(on);
  say("bind: %s", result(bind_to(fd, on, on->own_other, 0)));
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  close(fd);
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(bound_no_port, "bound.address-no-port") {
  int fd = stream(on);
  set(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
  say("bind: %s", result(bind_to(fd, on, on->own_other, 0)));
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  close(fd);
  say("far: %s", far_saw(ECHO));
}

CASE_EACH(bound_any, "bound.any-address") {
  int fd = stream(on);
  say("bind: %s", result(bind_to(fd, on, on->any, port_for(on, 21010))));
  say_names(fd);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
}

CASE_ON(only6, "bound.v6only", &v6) {
  int fd = stream(on);
  set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  close(fd);
  say("far: %s", far_saw(ECHO));
  fd = stream(on);
  set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
  say("mapped: %s", result(connect_to(fd, &mapped, mapped.far, ECHO)));
  say_names(fd);
}

/* One source port, two destinations at once. */
CASE_EACH(shared_port, "bound.one-port-two-destinations") {
  int one = stream(on), other = stream(on);
  set(one, SOL_SOCKET, SO_REUSEADDR, 1);
  set(other, SOL_SOCKET, SO_REUSEADDR, 1);
  say("bind: %s", result(bind_to(one, on, on->own, port_for(on, 21020))));
  say("bind: %s", result(bind_to(other, on, on->own, port_for(on, 21020))));
  say("first: %s", result(connect_to(one, on, on->far, ECHO)));
  say("second: %s", result(connect_to(other, on, on->far, FIRST)));
  say("first: %s", converse(one, "hello"));
}

/* One source port, one connection after the other. */
CASE_EACH(same_port_again, "bound.one-port-again") {
  for (int i = 0; i < 3; i++) {
    int fd = stream(on);
    set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    long bound = bind_to(fd, on, on->own, port_for(on, 21030));
    long connected = connect_to(fd, on, on->far, i % 2 ? FIRST : SILENT);
    say("bind %s, connect %s", result(bound), result(connected));
    shutdown(fd, SHUT_WR);
    say("received: %s", read_text(fd));
    close(fd);
  }
}

CASE_EACH(taken_port, "bound.taken-port") {
  int held = stream(on), fd = stream(on);
  bind_to(held, on, on->own, port_for(on, 21040));
  say("bind: %s", result(bind_to(fd, on, on->own, port_for(on, 21040))));
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say("answer: %s", converse(fd, "hello"));
}

/* Towards a network that is not the default route's. */
CASE_EACH(other_route, "names.other-route") {
  int fd = stream(on);
  say("connect: %s", result(connect_to(fd, on, on->far_other_route, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  close(fd);
  say("far: %s", far_saw(ECHO));
}

/* What tools see that read the kernel's tables instead of asking for names. */
CASE(tables, "names.proc-net-tcp") {
  int fd = dial(on, ECHO);
  struct sockaddr_storage local = {0};
  socklen_t length = sizeof local;
  getsockname(fd, (struct sockaddr *)&local, &length);
  char line[300];
  unsigned own_ip, own_port, far_ip, far_port;
  FILE *table = fopen("/proc/net/tcp", "r");
  bool found = false;
  while (table && fgets(line, sizeof line, table))
    if (sscanf(line, " %*d: %x:%x %x:%x", &own_ip, &own_port, &far_ip, &far_port) == 4)
      found |= (int)own_port == port_of(&local) && far_ip == inet_addr(on->far) && far_port == ECHO;
  say("the connection is listed: %s", found ? "yes" : "no");
}
