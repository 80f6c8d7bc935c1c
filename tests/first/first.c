/*
 * The workload of which nothing must be missed: its first instruction begins socket(2), its second system call is
 * connect(2). No libc, no loader, nothing before it. Built by tests/src/first.rs with ADDRESS and PORT (both in network
 * byte order) as macros.
 *
 * Connects, sends a byte, waits for one, and exits: 0 when it came, 1 without a socket, 2 when the connection was refused or
 * failed, 3 when no byte came.
 */
#if defined(__x86_64__)
#define SYS_read 0
#define SYS_write 1
#define SYS_socket 41
#define SYS_connect 42
#define SYS_exit_group 231
static long call(long number, long a, long b, long c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}
#elif defined(__aarch64__)
#define SYS_read 63
#define SYS_write 64
#define SYS_socket 198
#define SYS_connect 203
#define SYS_exit_group 94
static long call(long number, long a, long b, long c) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
  return x0;
}
#else
#error "this processor's system calls are not written down here"
#endif

static void end(long code) {
  for (;;) call(SYS_exit_group, code, 0, 0);
}

void _start(void) {
  struct { unsigned short family, port; unsigned int address; unsigned char zero[8]; } to = {2, PORT, ADDRESS, {0}};
  char byte = 'x';
  long socket = call(SYS_socket, 2, 1, 0);
  if (socket < 0) end(1);
  if (call(SYS_connect, socket, (long)&to, sizeof to) < 0) end(2);
  if (call(SYS_write, socket, (long)&byte, 1) != 1) end(3);
  if (call(SYS_read, socket, (long)&byte, 1) != 1) end(3);
  end(0);
}
