/*
 * Addresses, sockets with limits, and texts that are the same at each run.
 */
#include "differ.h"

const struct net v4 = {
  "v4", AF_INET, "0.0.0.0", "10.77.0.1", "10.77.0.5", "10.77.0.2", "10.77.0.4", "10.78.0.2",
  "10.98.0.9", "10.99.0.9", "10.77.0.66", "224.0.0.9",
};
const struct net v6 = {
  "v6", AF_INET6, "::", "fd77::1", "fd77::5", "fd77::2", "fd77::4", "fd78::2",
  "fd98::9", "fd99::9", "fd77::66", "ff02::9",
};
const struct net mapped = {
  "mapped", AF_INET6, "::", "::ffff:10.77.0.1", "::ffff:10.77.0.5", "::ffff:10.77.0.2", "::ffff:10.77.0.4",
  "::ffff:10.78.0.2", "::ffff:10.98.0.9", "::ffff:10.99.0.9", "::ffff:10.77.0.66", "::ffff:224.0.0.9",
};

/* Lower ports are the cases' own choice, higher ones the kernel's (or Pillion's). */
#define FIRST_CHOSEN_BY_KERNEL 32768

static char *buffer(void) {
  static __thread char buffers[32][5000];
  static __thread unsigned next;
  return buffers[next++ % 32];
}

const char *error_name(int error) {
  if (error == 0) return "0";
  const char *name = strerrorname_np(error);
  return name ? name : "an unknown error";
}

const char *result(long value) {
  if (value < 0) return error_name(errno);
  char *text = buffer();
  sprintf(text, "%ld", value);
  return text;
}

const char *readiness(unsigned events) {
  static const struct { unsigned bit; const char *name; } names[] = {
    {POLLIN, "IN"}, {POLLPRI, "PRI"}, {POLLOUT, "OUT"}, {POLLERR, "ERR"}, {POLLHUP, "HUP"}, {POLLNVAL, "NVAL"},
    {POLLRDHUP, "RDHUP"},
  };
  char *text = buffer();
  *text = 0;
  for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
    if (!(events & names[i].bit)) continue;
    if (*text) strcat(text, "|");
    strcat(text, names[i].name);
  }
  return *text ? text : "nothing";
}

struct sockaddr_storage at(const struct net *net, const char *host, int port) {
  struct sockaddr_storage address = {.ss_family = net->family};
  void *ip = net->family == AF_INET ? (void *)&((struct sockaddr_in *)&address)->sin_addr
                                    : (void *)&((struct sockaddr_in6 *)&address)->sin6_addr;
  if (inet_pton(net->family, host, ip) != 1) give_up("%s is no address", host);
  ((struct sockaddr_in *)&address)->sin_port = htons(port);
  return address;
}

socklen_t length_of(const struct sockaddr_storage *address) {
  return address->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

int port_for(const struct net *net, int base) { return base + (net == &v4 ? 0 : net == &v6 ? 1 : 2); }

int port_of(const struct sockaddr_storage *address) {
  return ntohs(((const struct sockaddr_in *)address)->sin_port);
}

const char *address_text(const struct sockaddr_storage *address) {
  char host[INET6_ADDRSTRLEN] = "?", *text = buffer();
  bool is6 = address->ss_family == AF_INET6;
  if (address->ss_family != AF_INET && !is6) {
    sprintf(text, "family %d", address->ss_family);
    return text;
  }
  const void *ip = is6 ? (const void *)&((const struct sockaddr_in6 *)address)->sin6_addr
                       : (const void *)&((const struct sockaddr_in *)address)->sin_addr;
  inet_ntop(address->ss_family, ip, host, sizeof host);
  int port = port_of(address);
  int length = sprintf(text, is6 ? "[%s]:" : "%s:", host);
  sprintf(text + length, port >= FIRST_CHOSEN_BY_KERNEL ? "*" : "%d", port);
  if (is6 && ((const struct sockaddr_in6 *)address)->sin6_scope_id) strcat(text, "%scope");
  return text;
}

void limits(int fd, int seconds) {
  struct timeval limit = {.tv_sec = seconds};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

static int limited(int fd) {
  if (fd < 0) give_up("socket: %s", result(-1));
  limits(fd, 10);
  return fd;
}

int stream(const struct net *net) { return limited(socket(net->family, SOCK_STREAM, 0)); }
int datagrams(const struct net *net) { return limited(socket(net->family, SOCK_DGRAM, 0)); }

long bind_to(int fd, const struct net *net, const char *host, int port) {
  struct sockaddr_storage address = at(net, host, port);
  return bind(fd, (struct sockaddr *)&address, length_of(&address));
}

long connect_to(int fd, const struct net *net, const char *host, int port) {
  struct sockaddr_storage address = at(net, host, port);
  return connect(fd, (struct sockaddr *)&address, length_of(&address));
}

int dial(const struct net *net, int port) {
  int fd = stream(net);
  long connected = connect_to(fd, net, net->far, port);
  if (connected < 0) give_up("connect: %s", result(connected));
  return fd;
}

int listener(const struct net *net, int port) {
  int fd = stream(net);
  set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind_to(fd, net, net->any, port) < 0 || listen(fd, 1000) < 0) give_up("listen: %s", result(-1));
  return fd;
}

void set(int fd, int level, int option, int value) {
  if (setsockopt(fd, level, option, &value, sizeof value) < 0)
    say("setsockopt %d %d: %s", level, option, result(-1));
}

int get(int fd, int level, int option) {
  int value = 0;
  socklen_t length = sizeof value;
  return getsockopt(fd, level, option, &value, &length) < 0 ? -1 : value;
}

void nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

void pause_for(int milliseconds) {
  struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
  nanosleep(&time, NULL);
}

long wait_for(int fd, short events, int milliseconds) {
  struct pollfd wanted = {.fd = fd, .events = POLLIN | POLLPRI | POLLOUT | POLLRDHUP};
  for (int waited = 0;; waited += 5) {
    if (poll(&wanted, 1, 0) < 0) return 0;
    if ((wanted.revents & events) == events || waited >= milliseconds) return (unsigned short)wanted.revents;
    pause_for(5);
  }
}

void say_names(int fd) {
  struct sockaddr_storage local = {0}, peer = {0};
  socklen_t length = sizeof local;
  long own = getsockname(fd, (struct sockaddr *)&local, &length);
  say("getsockname: %s", own < 0 ? result(own) : address_text(&local));
  length = sizeof peer;
  long other = getpeername(fd, (struct sockaddr *)&peer, &length);
  say("getpeername: %s", other < 0 ? result(other) : address_text(&peer));
}

void say_error(int fd) { say("SO_ERROR: %s", error_name(get(fd, SOL_SOCKET, SO_ERROR))); }

void say_state(int fd) {
  struct tcp_info info = {0};
  socklen_t length = sizeof info;
  long had = getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
  say("TCP_INFO state: %s", had < 0 ? result(had) : result(info.tcpi_state));
}

static char pattern_bytes[2 * PATTERN];
const char *const pattern = pattern_bytes;

void make_pattern(void) {
  uint64_t random = 88172645463325252u;
  for (int i = 0; i < PATTERN; i++) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    pattern_bytes[i] = pattern_bytes[PATTERN + i] = random >> 24;
  }
}

bool is_pattern(const char *bytes, size_t length, uint64_t offset) {
  while (length) {
    size_t part = length < PATTERN ? length : PATTERN;
    if (memcmp(bytes, pattern + offset % PATTERN, part)) return false;
    bytes += part, length -= part, offset += part;
  }
  return true;
}

long send_all(int fd, const void *bytes, size_t length) {
  size_t sent = 0;
  while (sent < length) {
    ssize_t now = send(fd, (const char *)bytes + sent, length - sent, MSG_NOSIGNAL);
    if (now < 0) return now;
    sent += now;
  }
  return sent;
}

long send_pattern(int fd, uint64_t length) {
  uint64_t sent = 0;
  while (sent < length) {
    uint64_t part = length - sent < PATTERN ? length - sent : PATTERN;
    ssize_t now = send(fd, pattern + sent % PATTERN, part, MSG_NOSIGNAL);
    if (now < 0) return now;
    sent += now;
  }
  return sent;
}

const char *read_pattern(int fd) {
  enum { SIZE = 256 << 10 };
  char *bytes = malloc(SIZE), *text = buffer();
  uint64_t got = 0;
  bool exact = true;
  ssize_t now;
  while ((now = recv(fd, bytes, SIZE, 0)) > 0) {
    exact &= is_pattern(bytes, now, got);
    got += now;
  }
  sprintf(text, "%llu %s bytes, then %s", (unsigned long long)got, exact ? "right" : "WRONG",
          now < 0 ? result(now) : "the end");
  free(bytes);
  return text;
}

const char *read_text(int fd) {
  char bytes[4001], *text = buffer();
  ssize_t got = 0, now = 0;
  while (got < 4000 && (now = recv(fd, bytes + got, 4000 - got, 0)) > 0) got += now;
  const char *end = now < 0 ? result(now) : now == 0 ? "the end" : "more";
  bytes[got] = 0;
  sprintf(text, "\"%s\", then %s", bytes, end);
  return text;
}

const char *receive(int fd) {
  char bytes[4001], *text = buffer();
  ssize_t got = recv(fd, bytes, 4000, 0);
  if (got < 0) return result(got);
  if (got == 0) return "the end";
  bytes[got] = 0;
  sprintf(text, "\"%s\"", bytes);
  return text;
}

const char *converse(int fd, const char *said) {
  long sent = send_all(fd, said, strlen(said));
  if (sent < 0) return result(sent);
  char bytes[4001] = "", *text = buffer();
  ssize_t got = 0, now = 1;
  while (got < sent && (now = recv(fd, bytes + got, sent - got, 0)) > 0) got += now;
  if (now < 0) return result(now);
  sprintf(text, "\"%s\"", bytes);
  return text;
}

const char *ask(const char *format, ...) {
  char question[1000], *answer = buffer();
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(question, sizeof question, format, arguments);
  va_end(arguments);
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  limits(fd, 15);
  struct sockaddr_storage to = at(&v4, v4.far, CONTROL);
  ssize_t got = -1;
  if (sendto(fd, question, length, 0, (struct sockaddr *)&to, length_of(&to)) == length)
    got = recv(fd, answer, 4900, 0);
  answer[got < 0 ? sprintf(answer, "no answer: %s", result(-1)) : got] = 0;
  close(fd);
  return answer;
}

const char *far_saw(int port) { return ask("next %d", port); }
