/*
 * The HTTP client in C of the comparison of languages: a name from /etc/hosts, one request, several over one connection,
 * many connections at once. The others say the same in their own ways.
 */
#include "differ.h"
#include <netdb.h>

static int connected(const char *name) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
  char port[10];
  snprintf(port, sizeof port, "%d", HTTP);
  int code = getaddrinfo(name, port, &hints, &found);
  if (code) {
    printf("%s: %s\n", name, gai_strerror(code));
    return -1;
  }
  int fd = -1;
  for (struct addrinfo *at = found; at; at = at->ai_next) {
    fd = socket(at->ai_family, at->ai_socktype, at->ai_protocol);
    limits(fd, 20);
    if (!connect(fd, at->ai_addr, at->ai_addrlen)) break;
    close(fd);
    fd = -1;
  }
  freeaddrinfo(found);
  return fd;
}

/* One exchange; the body, or what went wrong. */
static void exchange(int fd, const char *path, bool last, char *body) {
  char request[300], answer[1000];
  int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: far.test\r\n%s\r\n", path, last ? "Connection: close\r\n" : "");
  strcpy(body, "failed");
  if (send_all(fd, request, size) < 0) return;
  ssize_t have = 0, now;
  while ((now = recv(fd, answer + have, sizeof answer - 1 - have, 0)) > 0) {
    answer[have += now] = 0;
    char *head = strstr(answer, "\r\n\r\n"), *length = strstr(answer, "Content-Length: ");
    if (!head || !length) continue;
    size_t wanted = atoi(length + 16);
    if (strlen(head + 4) < wanted) continue;
    sprintf(body, "%.*s", (int)wanted, head + 4);
    return;
  }
}

static void *one(void *given) {
  char *body = given, path[20];
  strcpy(path, body);
  int fd = connected("far.test");
  exchange(fd, path, true, body);
  close(fd);
  return NULL;
}

int run_client(int argc, char **argv) {
  char body[1000];
  for (int i = 0; i < argc; i++) {
    int fd = connected(argv[i]);
    struct sockaddr_storage peer = {0};
    socklen_t length = sizeof peer;
    getpeername(fd, (struct sockaddr *)&peer, &length);
    exchange(fd, "/once", true, body);
    printf("%s at %s: %s\n", argv[i], address_text(&peer), body);
    close(fd);
  }
  int fd = connected("far.test");
  for (int i = 0; i < 5; i++) {
    char path[20];
    sprintf(path, "/kept/%d", i);
    exchange(fd, path, false, body);
    printf("kept: %s\n", body);
  }
  close(fd);
  enum { MANY = 100 };
  static char bodies[MANY][1000];
  pthread_t threads[MANY];
  int right = 0;
  for (int i = 0; i < MANY; i++) {
    sprintf(bodies[i], "/many/%d", i);
    pthread_create(&threads[i], NULL, one, bodies[i]);
  }
  for (int i = 0; i < MANY; i++) {
    char wanted[100];
    pthread_join(threads[i], NULL);
    sprintf(wanted, "you asked for /many/%d", i);
    right += !strcmp(bodies[i], wanted);
  }
  printf("many: %d\n", right);
  return 0;
}
