/*
 * Cases about socket options: set, read back before and after the connection, and what they do.
 */
#include "differ.h"
#include <net/if.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

CASE_EACH(read_back, "options.read-back") {
  static const struct { const char *name; int level, option, value; } options[] = {
    {"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, 1}, {"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, 7},
    {"TCP_KEEPINTVL", IPPROTO_TCP, TCP_KEEPINTVL, 3}, {"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, 4},
    {"TCP_USER_TIMEOUT", IPPROTO_TCP, TCP_USER_TIMEOUT, 9000}, {"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, 1},
    {"TCP_LINGER2", IPPROTO_TCP, TCP_LINGER2, 20}, {"TCP_SYNCNT", IPPROTO_TCP, TCP_SYNCNT, 3},
    {"SO_MARK", SOL_SOCKET, SO_MARK, 99}, {"SO_PRIORITY", SOL_SOCKET, SO_PRIORITY, 5},
    {"IP_TOS", IPPROTO_IP, IP_TOS, 0x10}, {"IP_TTL", IPPROTO_IP, IP_TTL, 33},
    {"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, 100000}, {"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, 100000},
    {"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR, 1}, {"SO_REUSEPORT", SOL_SOCKET, SO_REUSEPORT, 1},
    {"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, 1}, {"SO_RCVLOWAT", SOL_SOCKET, SO_RCVLOWAT, 2},
    {"TCP_NOTSENT_LOWAT", IPPROTO_TCP, TCP_NOTSENT_LOWAT, 65536}, {"TCP_WINDOW_CLAMP", IPPROTO_TCP, TCP_WINDOW_CLAMP, 60000},
    {"SO_MAX_PACING_RATE", SOL_SOCKET, SO_MAX_PACING_RATE, 100000000}, {"SO_BUSY_POLL", SOL_SOCKET, SO_BUSY_POLL, 10},
    {"IP_BIND_ADDRESS_NO_PORT", IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1}, {"TCP_QUICKACK", IPPROTO_TCP, TCP_QUICKACK, 1},
  };
  enum { COUNT = sizeof options / sizeof *options };
  int fd = stream(on);
  for (int i = 0; i < COUNT; i++) set(fd, options[i].level, options[i].option, options[i].value);
  if (on != &v4) set(fd, IPPROTO_IPV6, IPV6_TCLASS, 0x20), set(fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 44);
  for (int after = 0; after < 2; after++) {
    for (int i = 0; i < COUNT; i++)
      if (options[i].option != TCP_QUICKACK || !after)
        say("%s %s: %d", after ? "after" : "before", options[i].name, get(fd, options[i].level, options[i].option));
    if (on != &v4)
      say("IPV6: tclass %d, hops %d, v6only %d", get(fd, IPPROTO_IPV6, IPV6_TCLASS),
          get(fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS), get(fd, IPPROTO_IPV6, IPV6_V6ONLY));
    if (!after) say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  }
  say("answer: %s", converse(fd, "hello"));
  char congestion[20] = "";
  socklen_t length = sizeof congestion;
  getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, &length);
  say("TCP_CONGESTION: %s", congestion);
  struct sockaddr_storage destination;
  length = sizeof destination;
  say("SO_ORIGINAL_DST: %s", result(getsockopt(fd, IPPROTO_IP, 80, &destination, &length)));
}

/* What belongs to the way to the other end of this very socket. */
CASE_EACH(path, "options.path") {
  int fd = dial(on, ECHO), largest = get(fd, IPPROTO_TCP, TCP_MAXSEG);
  int mtu = on == &v6 ? get(fd, IPPROTO_IPV6, IPV6_MTU) : get(fd, IPPROTO_IP, IP_MTU);
  say("TCP_MAXSEG within Ethernet's: %s", largest > 0 && largest <= 1460 ? "yes" : "no");
  say("MTU: %d", mtu);
}

CASE_EACH(device, "options.SO_BINDTODEVICE") {
  int fd = stream(on);
  char name[IFNAMSIZ] = "";
  socklen_t length = sizeof name;
  say("set: %s", result(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "far", 4)));
  getsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, &length);
  say("before: \"%s\"", length ? name : "");
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  length = sizeof name;
  *name = 0;
  getsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, &length);
  say("after: \"%s\"", length ? name : "");
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  fd = stream(on);
  say("no such device: %s", result(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "none", 5)));
}

/* A rule of this host forbids what bears the mark 7. */
CASE_EACH(mark, "options.SO_MARK-routes") {
  int fd = stream(on);
  set(fd, SOL_SOCKET, SO_MARK, 7);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
}

/* The far end's kernel gives its socket the type of service that the first packet bore. */
CASE(tos, "options.IP_TOS-arrives") {
  int fd = stream(on);
  set(fd, IPPROTO_IP, IP_TOS, 0x10);
  connect_to(fd, on, on->far, SILENT);
  close(fd);
  say("far: %s", far_saw(SILENT));
}

CASE(multipath, "options.multipath-tcp") {
  int fd = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP);
  say("socket: %s", fd < 0 ? result(-1) : "had");
  if (fd < 0) fd = stream(on);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
}

CASE_EACH(idle, "options.idle") {
  int fd = dial(on, ECHO);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, 1);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 1000);
  say("answer: %s", converse(fd, "before"));
  pause_for(2500);
  say("readiness: %s", readiness(wait_for(fd, 0, 0)));
  say("answer: %s", converse(fd, "after"));
}
