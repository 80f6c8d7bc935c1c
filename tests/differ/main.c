/*
 * The differential test's application. It does with sockets what programs do, in named cases, and prints what it observes:
 * lines `case: observation` that must be the same wherever it runs. tests/tests/differ.rs builds it, runs it bare and
 * under Pillion, and compares.
 *
 *   differ peer              the far end (peer.c), in the other namespace
 *   differ run [PREFIX...]   all cases, or those whose names begin so
 *   differ client ...        a small HTTP client (client.c)
 */
#include "differ.h"

#define CASES 400
#define CASE_SECONDS 100

static struct { const char *name; const struct net *net; body *run; } cases[CASES];
static int count;
static const char *current = "-";

void enlist(const char *name, const struct net *net, body *run) {
  if (count == CASES) abort();
  cases[count].name = name;
  cases[count].net = net;
  cases[count].run = run;
  count++;
}

static void line(const char *format, va_list arguments) {
  char text[6000];
  vsnprintf(text, sizeof text, format, arguments);
  for (char *c = text; *c; c++)
    if (*c == '\n') *c = ' ';
  printf("%s: %s\n", current, text);
  fflush(stdout);
}

void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  line(format, arguments);
  va_end(arguments);
}

void give_up(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  line(format, arguments);
  va_end(arguments);
  exit(0);
}

static void run(int number) {
  current = cases[number].name;
  /* What the case before has left: a companion may still be busy with it. */
  const char *quiet = ask("quiet");
  if (strcmp(quiet, "yes")) say("before: the far end is not quiet: %s", quiet);
  pid_t child = fork();
  if (child == 0) {
    setpgid(0, 0);
    alarm(CASE_SECONDS);
    cases[number].run(cases[number].net);
    exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) say("the case cannot be run: %s", result(-1));
  /* Whatever it has started and not ended. */
  kill(-child, SIGKILL);
  if (WIFSIGNALED(status)) say("ended by signal %d", WTERMSIG(status));
  else if (WEXITSTATUS(status)) say("ended with code %d", WEXITSTATUS(status));
}

static int by_name(const void *one, const void *other) {
  return strcmp(*(const char *const *)one, *(const char *const *)other);
}

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  make_pattern();
  signal(SIGPIPE, SIG_IGN);
  if (!strcmp(argv[1], "peer")) return run_peer();
  if (!strcmp(argv[1], "client")) return run_client(argc - 2, argv + 2);
  if (strcmp(argv[1], "run")) return 2;
  qsort(cases, count, sizeof cases[0], by_name);
  for (int number = 0; number < count; number++) {
    bool wanted = argc == 2;
    for (int i = 2; i < argc; i++) wanted |= !strncmp(cases[number].name, argv[i], strlen(argv[i]));
    if (wanted) run(number);
  }
  return 0;
}
