/*
 * Cases about datagrams, which Pillion leaves alone.
 */
#include "differ.h"

CASE_EACH(connected, "udp.connected") {
  int fd = datagrams(on);
  say("connect: %s", result(connect_to(fd, on, on->far, ECHO)));
  say_names(fd);
  say("answer: %s", converse(fd, "hello"));
  say("refused port: %s", result(connect_to(fd, on, on->far, NOBODY)));
  say("send: %s", result(send(fd, "x", 1, 0)));
  say("received: %s", receive(fd));
  struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
  say("disconnect: %s", result(connect(fd, &nowhere, sizeof nowhere)));
  say_names(fd);
}

CASE_EACH(unconnected, "udp.unconnected") {
  int fd = datagrams(on);
  if (on == &v6) set(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
  else set(fd, IPPROTO_IP, IP_PKTINFO, 1);
  struct sockaddr_storage to = at(on, on->far, ECHO), from = {0};
  say("bind: %s", result(bind_to(fd, on, on->any, 22000)));
  say("sendto: %s", result(sendto(fd, "hello", 5, 0, (struct sockaddr *)&to, length_of(&to))));
  char bytes[20] = "", control[200];
  struct iovec part = {bytes, 3};
  struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part, .msg_iovlen = 1,
                           .msg_control = control, .msg_controllen = sizeof control};
  long got = recvmsg(fd, &message, 0);
  say("recvmsg: %s %s, from %s, flags %x", result(got), bytes, address_text(&from), message.msg_flags);
  for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head))
    say("ancillary: level %d, type %d", head->cmsg_level, head->cmsg_type);
}

CASE_EACH(several, "udp.recvmmsg") {
  int fd = datagrams(on);
  say("bind: %s", result(bind_to(fd, on, on->own, 22001)));
  char out[3][8] = {"one", "two", "three"}, in[3][16] = {"", "", ""};
  struct sockaddr_storage to = at(on, on->far, ECHO), from[3] = {0};
  struct iovec parts[3], into[3];
  struct mmsghdr sent[3] = {0}, received[3] = {0};
  for (int i = 0; i < 3; i++) {
    parts[i] = (struct iovec){out[i], strlen(out[i])};
    into[i] = (struct iovec){in[i], 15};
    sent[i].msg_hdr = (struct msghdr){.msg_name = &to, .msg_namelen = length_of(&to), .msg_iov = &parts[i], .msg_iovlen = 1};
    received[i].msg_hdr = (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &into[i], .msg_iovlen = 1};
  }
  say("sendmmsg: %s", result(sendmmsg(fd, sent, 3, 0)));
  say("recvmmsg: %s", result(recvmmsg(fd, received, 3, MSG_WAITALL, NULL)));
  for (int i = 0; i < 3; i++) say("%s from %s", in[i], address_text(&from[i]));
}

CASE_EACH(two_servers, "udp.one-socket-two-destinations") {
  int fd = datagrams(on);
  const char *hosts[] = {on->far, on->far_other_route};
  for (int i = 0; i < 2; i++) {
    struct sockaddr_storage to = at(on, hosts[i], ECHO), from = {0};
    socklen_t length = sizeof from;
    char bytes[10] = "";
    sendto(fd, i ? "two" : "one", 3, 0, (struct sockaddr *)&to, length_of(&to));
    long got = recvfrom(fd, bytes, 9, 0, (struct sockaddr *)&from, &length);
    say("answer: %s %s from %s", result(got), bytes, address_text(&from));
  }
}

CASE_EACH(no_way, "udp.unreachable") {
  int fd = datagrams(on);
  say("connect: %s", result(connect_to(fd, on, on->unreachable, ECHO)));
}
