/* A D-Bus service on sd-bus, for the bench: Take(ah) -> u. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-bus.h>

static int take(sd_bus_message *message, void *data, sd_bus_error *error) {
    uint32_t count = 0;
    int fd;
    (void)data, (void)error;
    if (sd_bus_message_enter_container(message, 'a', "h") < 0)
        return -1;
    /* They stay the message's, which closes them. */
    while (sd_bus_message_read_basic(message, 'h', &fd) > 0)
        count++;
    return sd_bus_reply_method_return(message, "u", count);
}

static const sd_bus_vtable methods[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD("Take", "ah", "u", take, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_VTABLE_END,
};

static int accept_one(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1))
        return -1;
    return accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

/* with_sd_bus serve PEER KIND SOCKET NAME */
int main(int count, char **arguments) {
    sd_bus *bus;
    int is_bus, result;
    if (count != 6 || sd_bus_new(&bus) < 0)
        return 1;
    is_bus = !strcmp(arguments[3], "dbus-bus");
    if (is_bus) {
        char address[256];
        snprintf(address, sizeof address, "unix:path=%s", arguments[4]);
        sd_bus_set_address(bus, address);
        sd_bus_set_bus_client(bus, 1);
    } else {
        sd_id128_t id;
        int fd = accept_one(arguments[4]);
        sd_id128_randomize(&id);
        if (sd_bus_set_fd(bus, fd, fd) < 0 || sd_bus_set_server(bus, 1, id) < 0)
            return 1;
    }
    sd_bus_negotiate_fds(bus, 1);
    if (sd_bus_start(bus) < 0)
        return 1;
    if (sd_bus_add_object_vtable(bus, NULL, "/bench", "com.example.Bench", methods, NULL) < 0)
        return 1;
    if (is_bus && sd_bus_request_name(bus, arguments[5], 0) < 0)
        return 1;
    for (;;) {
        result = sd_bus_process(bus, NULL);
        if (result < 0)
            return 0;
        if (result == 0 && sd_bus_wait(bus, UINT64_MAX) < 0)
            return 0;
    }
}
