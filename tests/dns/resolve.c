// Asks for names by getaddrinfo() of the C library that this is linked with, and prints the addresses.
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>

int main(int count, char **names) {
    for (int number = 1; number < count; number++) {
        struct addrinfo wanted = {.ai_socktype = SOCK_STREAM}, *found;
        int error = getaddrinfo(names[number], NULL, &wanted, &found);
        if (error) {
            printf("%s: %s\n", names[number], gai_strerror(error));
            return 1;
        }
        for (struct addrinfo *one = found; one; one = one->ai_next) {
            char text[NI_MAXHOST];
            if (getnameinfo(one->ai_addr, one->ai_addrlen, text, sizeof text, NULL, 0, NI_NUMERICHOST)) return 1;
            printf("%s\n", text);
        }
        freeaddrinfo(found);
    }
    return 0;
}
