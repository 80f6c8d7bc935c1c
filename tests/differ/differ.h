/*
 * What all of the differential test shares: cases and what they say, addresses, control of the far end. See main.c.
 */
#ifndef DIFFER_H
#define DIFFER_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Ports of the far end, by what it does there. See peer.c. */
enum port {
  CONTROL = 7000, /* UDP */
  ECHO,           /* also UDP */
  FIRST,          /* says "welcome", then echoes */
  HALF,           /* says "bye" and ends its stream, then reads up to the end */
  RESET,          /* resets at once */
  RESET_AFTER,    /* sends 1000 bytes, resets when they have been taken */
  SLOW,           /* reads nothing for a while, then all */
  CLOSE,          /* closes at once */
  SILENT,         /* reads up to the end, says nothing */
  SOURCE,         /* is sent a number in 8 bytes, sends as many bytes and closes */
  SINK,           /* reads up to the end, says how many bytes those were, and whether the right ones */
  RESET_ON_DATA,  /* resets when it has read something */
  UNREAD,         /* answers "413" and closes without having read */
  URGENT,         /* reads with a look at urgent data, sends some back */
  HTTP,           /* HTTP/1.1, connections kept */
  LAST_PORT,
  FULL = 7998,    /* a listener whose backlog is full: answers no SYN */
  NOBODY = 7999,  /* refused */
};

/* Of the application's own ports: the one whose incoming connections are redirected, and one whose are not. */
enum { INBOUND = 8080, ASIDE = 8081 };

/* One way to say the same addresses. */
struct net {
  const char *name;
  int family;
  const char *any, *own, *own_other; /* of this host */
  const char *far, *far_vanishing, *far_other_route; /* of the far end; the second can be made to vanish */
  const char *unreachable, *prohibited, *silent, *multicast;
};
extern const struct net v4, v6, mapped;

/* Cases register themselves before main; each runs in a process of its own. */
typedef void body(const struct net *);
void enlist(const char *name, const struct net *net, body *run);
#define CASE_ON(function, name, way) \
  static body function; \
  __attribute__((constructor)) static void enlist_##function(void) { enlist(name, way, function); } \
  static void function(const struct net *on)
#define CASE(function, name) CASE_ON(function, name, &v4)
#define CASE_EACH(function, name) \
  static body function; \
  __attribute__((constructor)) static void enlist_##function(void) { \
    enlist(name "/v4", &v4, function); \
    enlist(name "/v6", &v6, function); \
    enlist(name "/mapped", &mapped, function); \
  } \
  static void function(const struct net *on)

/* An observation: a line with the case's name before it. The first word should say what was observed. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* What cannot be observed any further: said, and the case is over. */
void give_up(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Numbers as text. Each returns one of several buffers. */
const char *result(long value);          /* of a system call: its value or errno's name */
const char *error_name(int error);
const char *readiness(unsigned events);
const char *address_text(const struct sockaddr_storage *address); /* ports that the kernel chose are "*" */

struct sockaddr_storage at(const struct net *net, const char *host, int port);
socklen_t length_of(const struct sockaddr_storage *address);
/* `base` and the next two are for IPv4, IPv6 and mapped: a port is in use for a while after its connection. */
int port_for(const struct net *net, int base);
int port_of(const struct sockaddr_storage *address);

/* Sockets have limits of 10 s on every wait. */
int stream(const struct net *net);
int datagrams(const struct net *net);
long bind_to(int fd, const struct net *net, const char *host, int port);
long connect_to(int fd, const struct net *net, const char *host, int port);
int dial(const struct net *net, int port);       /* to the far end; gives up when that fails */
int listener(const struct net *net, int port);   /* on any address */
void set(int fd, int level, int option, int value);
int get(int fd, int level, int option);          /* -1 when it cannot be had */
void nonblocking(int fd);
long wait_for(int fd, short events, int milliseconds); /* what poll says, when all of `events` are there or the time is over */
void pause_for(int milliseconds);
void limits(int fd, int seconds);

void say_names(int fd);
void say_error(int fd);                          /* SO_ERROR */
void say_state(int fd);                          /* TCP_INFO */

/* The pattern that all long transfers are made of. */
extern const char *const pattern;
enum { PATTERN = 1 << 20 };
void make_pattern(void);
bool is_pattern(const char *bytes, size_t length, uint64_t offset);

long send_all(int fd, const void *bytes, size_t length);
long send_pattern(int fd, uint64_t length);
/* Reads to the end of the stream; says how many bytes came, whether the pattern, and what the end was. */
const char *read_pattern(int fd);
/* Reads up to the end, at most 4000 bytes; `"text", then END`. */
const char *read_text(int fd);
const char *receive(int fd);                     /* once */
const char *converse(int fd, const char *text);  /* sends, and receives as many bytes */

/* Asks the far end's control, see peer.c; its answer. */
const char *ask(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* How the far end saw the next connection on that port that has ended. */
const char *far_saw(int port);

int run_peer(void);
int run_client(int argc, char **argv);
#endif
