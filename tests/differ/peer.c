/*
 * The far end: one behaviour for each port (differ.h), a thread for each connection, and a control by UDP.
 *
 * The control answers one datagram with one:
 *   quiet            waits until no connection is open here, and forgets how those before ended
 *   next PORT        how the next connection on PORT ended, as seen from here; waits up to 5 s
 *   vanish, appear   takes the address for that away, gives it back
 *   call HOW FAMILY ADDRESS PORT   dials the application and does HOW; `next 0` tells what it saw
 */
#include "differ.h"

static struct ending { struct ending *next; int port; char text[600]; } *endings, **last_ending = &endings;
static int open_connections;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(int port, const char *format, ...) {
  struct ending *ending = calloc(1, sizeof *ending);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(ending->text, sizeof ending->text, format, arguments);
  va_end(arguments);
  ending->port = port;
  pthread_mutex_lock(&lock);
  *last_ending = ending;
  last_ending = &ending->next;
  pthread_mutex_unlock(&lock);
}

static void next_ending(int port, char *answer) {
  strcpy(answer, "nothing");
  for (int waited = 0; waited < 5000; waited += 5) {
    pthread_mutex_lock(&lock);
    for (struct ending **at = &endings; *at; at = &(*at)->next) {
      struct ending *found = *at;
      if (found->port != port) continue;
      if (!(*at = found->next)) last_ending = at;
      pthread_mutex_unlock(&lock);
      strcpy(answer, found->text);
      free(found);
      return;
    }
    pthread_mutex_unlock(&lock);
    pause_for(5);
  }
}

static void quiet(char *answer) {
  int open = 0;
  for (int waited = 0; waited < 10000; waited += 5) {
    pthread_mutex_lock(&lock);
    if (!(open = open_connections)) {
      while (endings) {
        struct ending *old = endings;
        endings = old->next;
        free(old);
      }
      last_ending = &endings;
    }
    pthread_mutex_unlock(&lock);
    if (!open) {
      strcpy(answer, "yes");
      return;
    }
    pause_for(5);
  }
  sprintf(answer, "%d connections", open);
}

/* What was sent has been taken by the other side's kernel: a reset does not overtake it. */
static void acknowledged(int fd) {
  for (int waited = 0, left = 1; left && waited < 5000; waited += 2) {
    if (ioctl(fd, TIOCOUTQ, &left) < 0) return;
    if (left) pause_for(2);
  }
}

static void reset(int fd) {
  struct linger none = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
}

static void http(int fd) {
  char request[8192];
  size_t have = 0;
  for (;;) {
    char *end;
    while (request[have] = 0, !(end = strstr(request, "\r\n\r\n"))) {
      ssize_t now = have + 1 < sizeof request ? recv(fd, request + have, sizeof request - 1 - have, 0) : 0;
      if (now <= 0) return;
      have += now;
    }
    char path[200] = "?", body[400], answer[800];
    sscanf(request, "%*s %199s", path);
    *end = 0;
    bool ends = strcasestr(request, "\r\nconnection: close") != NULL;
    int length = sprintf(body, "you asked for %s", path);
    /* Chunked, because clients treat that differently from a length. */
    int size = sprintf(answer, strstr(path, "chunked")
      ? "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n"
      : "HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s",
      ends ? "Connection: close\r\n" : "", length, body);
    if (send_all(fd, answer, size) < 0 || ends) return;
    have -= end + 4 - request;
    memmove(request, end + 4, have);
  }
}

static void urgent(int fd, char *text) {
  char byte;
  strcpy(text, "in order:");
  for (;;) {
    int mark = 0;
    struct pollfd ready = {.fd = fd, .events = POLLIN | POLLPRI};
    poll(&ready, 1, 5000);
    ioctl(fd, SIOCATMARK, &mark);
    if (mark && recv(fd, &byte, 1, MSG_OOB) == 1) sprintf(text + strlen(text), " urgent %c", byte);
    ssize_t got = recv(fd, &byte, 1, 0);
    if (got <= 0) break;
    sprintf(text + strlen(text), " %c", byte);
  }
  send_all(fd, "xy", 2);
  send(fd, "!", 1, MSG_OOB);
  send_all(fd, "z", 1);
}

static const char *end_of(ssize_t got) { return got < 0 ? result(got) : "the end"; }

static void serve(int fd, int port, const char *source) {
  char *bytes = malloc(64 << 10), text[400] = "";
  uint64_t total = 0, wanted = 0;
  ssize_t got = 0;
  bool exact = true;
  switch (port) {
  case FIRST:
    send_all(fd, "welcome", 7);
    /* fall through */
  case ECHO:
    while ((got = recv(fd, bytes, 64 << 10, 0)) > 0) {
      total += got;
      if (send_all(fd, bytes, got) < 0) {
        got = -1;
        break;
      }
    }
    note(port, "from %s, %llu bytes, then %s", source, (unsigned long long)total, end_of(got));
    break;
  case HALF:
    send_all(fd, "bye", 3);
    shutdown(fd, SHUT_WR);
    note(port, "%s", read_text(fd));
    break;
  case RESET:
    reset(fd);
    break;
  case RESET_AFTER:
    send_all(fd, pattern, 1000);
    acknowledged(fd);
    reset(fd);
    break;
  case SLOW:
    pause_for(700);
    note(port, "%s", read_pattern(fd));
    break;
  case CLOSE:
    break;
  case SILENT:
    note(port, "from %s, tos %d, %s", source, get(fd, IPPROTO_IP, IP_TOS), read_pattern(fd));
    break;
  case SOURCE:
    if (recv(fd, &wanted, 8, MSG_WAITALL) == 8) send_pattern(fd, wanted);
    break;
  case SINK:
    while ((got = recv(fd, bytes, 64 << 10, 0)) > 0) exact &= is_pattern(bytes, got, total), total += got;
    sprintf(text, "%llu %s bytes", (unsigned long long)total, exact ? "right" : "WRONG");
    send_all(fd, text, strlen(text));
    note(port, "%s, then %s", text, end_of(got));
    break;
  case RESET_ON_DATA:
    recv(fd, bytes, 1000, 0);
    reset(fd);
    break;
  case UNREAD:
    recv(fd, bytes, 1, MSG_PEEK);
    send_all(fd, "413", 3);
    acknowledged(fd);
    break;
  case URGENT:
    urgent(fd, text);
    note(port, "%s", text);
    break;
  case HTTP:
    http(fd);
    break;
  }
  free(bytes);
}

/* What the far end does as a client of the application; what it saw is noted at port 0. */
static void call(char *how, const struct net *net, const char *address, int port) {
  int fd = stream(net);
  limits(fd, 5);
  char text[300];
  long connected = connect_to(fd, net, address, port);
  if (connected < 0) {
    note(0, "connect: %s", result(connected));
  } else if (!strcmp(how, "talk")) {
    /* A reset may come before that. */
    long sent = send_all(fd, "question", 8);
    if (sent < 0) note(0, "\"\", then %s", result(sent));
    else note(0, "%s", read_text(fd));
  } else if (!strcmp(how, "names")) {
    struct sockaddr_storage peer = {0}, local = {0};
    socklen_t length = sizeof peer, other = sizeof local;
    getpeername(fd, (struct sockaddr *)&peer, &length);
    getsockname(fd, (struct sockaddr *)&local, &other);
    sprintf(text, "getpeername %s, getsockname %s, ", address_text(&peer), address_text(&local));
    note(0, "%s%s", text, read_text(fd));
  } else if (!strcmp(how, "listen")) {
    note(0, "%s", read_text(fd));
  } else if (!strcmp(how, "half")) {
    send_all(fd, "all", 3);
    shutdown(fd, SHUT_WR);
    note(0, "%s", read_text(fd));
  } else if (!strcmp(how, "reset")) {
    send_all(fd, "gone", 4);
    acknowledged(fd);
    reset(fd);
    note(0, "reset");
  } else if (!strcmp(how, "close")) {
    note(0, "closed");
  } else if (!strcmp(how, "late")) {
    pause_for(300);
    send_all(fd, "late", 4);
    note(0, "%s", read_text(fd));
  } else if (!strcmp(how, "push")) {
    long sent = send_pattern(fd, 16 << 20);
    shutdown(fd, SHUT_WR);
    note(0, "sent %s, %s", result(sent), read_text(fd));
  } else if (!strcmp(how, "pull")) {
    note(0, "%s", read_pattern(fd));
  } else if (!strcmp(how, "urgent")) {
    send_all(fd, "ab", 2);
    send(fd, "!", 1, MSG_OOB);
    send_all(fd, "c", 1);
    shutdown(fd, SHUT_WR);
    note(0, "%s", read_text(fd));
  }
  close(fd);
}

struct work { int fd, port; struct sockaddr_storage from; char question[1000]; };

static void begin(void *(*run)(void *), struct work *work) {
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  if (pthread_create(&thread, &attributes, run, work)) abort();
}

static void *connection(void *given) {
  struct work *work = given;
  const char *source = address_text(&work->from);
  limits(work->fd, 20);
  serve(work->fd, work->port, source);
  close(work->fd);
  free(work);
  pthread_mutex_lock(&lock);
  open_connections--;
  pthread_mutex_unlock(&lock);
  return NULL;
}

static void *acceptor(void *given) {
  struct work *on = given;
  for (;;) {
    struct work *work = calloc(1, sizeof *work);
    socklen_t length = sizeof work->from;
    work->port = on->port;
    work->fd = accept(on->fd, (struct sockaddr *)&work->from, &length);
    if (work->fd < 0) abort();
    pthread_mutex_lock(&lock);
    open_connections++;
    pthread_mutex_unlock(&lock);
    begin(connection, work);
  }
}

static void *answering(void *given) {
  struct work *work = given;
  char answer[5000] = "no such question", how[20], family[20], address[64];
  int port;
  if (!strcmp(work->question, "quiet")) {
    quiet(answer);
  } else if (sscanf(work->question, "next %d", &port) == 1) {
    next_ending(port, answer);
  } else if (!strcmp(work->question, "vanish")) {
    int code = system("ip address del 10.77.0.4/24 dev near && ip -6 address del fd77::4/64 dev near");
    sprintf(answer, "code %d", code);
  } else if (!strcmp(work->question, "appear")) {
    int code = system("ip address add 10.77.0.4/24 dev near && ip -6 address add fd77::4/64 dev near nodad preferred_lft 0");
    sprintf(answer, "code %d", code);
  } else if (sscanf(work->question, "call %19s %19s %63s %d", how, family, address, &port) == 4) {
    call(how, strcmp(family, "v4") ? &v6 : &v4, address, port);
    strcpy(answer, "called");
  }
  sendto(work->fd, answer, strlen(answer), 0, (struct sockaddr *)&work->from, length_of(&work->from));
  free(work);
  return NULL;
}

/* Datagrams on `fd`; what comes is echoed from the address it came to, or answered as control. */
static void *datagram(void *given) {
  struct work *on = given;
  for (;;) {
    struct work *work = calloc(1, sizeof *work);
    char control[200];
    struct iovec part = {work->question, sizeof work->question - 1};
    struct msghdr message = {.msg_name = &work->from, .msg_namelen = sizeof work->from, .msg_iov = &part,
                             .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(on->fd, &message, 0);
    if (got < 0) abort();
    work->fd = on->fd;
    if (on->port == CONTROL) {
      begin(answering, work);
    } else {
      part.iov_len = got;
      sendmsg(on->fd, &message, 0);
      free(work);
    }
  }
}

static void listen_on(int port) {
  struct work *work = calloc(1, sizeof *work);
  work->fd = listener(&v6, port);
  work->port = port;
  set(work->fd, IPPROTO_TCP, TCP_FASTOPEN, 64);
  limits(work->fd, 0);
  /* Inherited: a connection of which nobody knows any more ends soon. */
  set(work->fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(work->fd, IPPROTO_TCP, TCP_KEEPIDLE, 2);
  set(work->fd, IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set(work->fd, IPPROTO_TCP, TCP_KEEPCNT, 5);
  begin(acceptor, work);
}

static void datagrams_on(const struct net *net, int port) {
  struct work *work = calloc(1, sizeof *work);
  work->fd = datagrams(net);
  work->port = port;
  limits(work->fd, 0);
  if (net == &v6) {
    set(work->fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    set(work->fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
  } else {
    set(work->fd, IPPROTO_IP, IP_PKTINFO, 1);
  }
  if (bind_to(work->fd, net, net->any, port) < 0) abort();
  begin(datagram, work);
}

int run_peer(void) {
  /* A listener that answers no SYN: its queue is full of connections that nobody accepts. */
  int full = stream(&v6);
  if (bind_to(full, &v6, "::", FULL) < 0 || listen(full, 0) < 0) return 1;
  for (int i = 0; i < 4; i++) {
    int fd = stream(&v4);
    nonblocking(fd);
    connect_to(fd, &v4, "127.0.0.1", FULL);
  }
  for (int port = ECHO; port < LAST_PORT; port++) listen_on(port);
  datagrams_on(&v4, ECHO);
  datagrams_on(&v6, ECHO);
  datagrams_on(&v4, CONTROL);
  printf("ready\n");
  fflush(stdout);
  for (;;) pause();
}
