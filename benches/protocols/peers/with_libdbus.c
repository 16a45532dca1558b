/* A D-Bus service on libdbus, for the bench: Take(ah) -> u. */

#include <dbus/dbus.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static DBusHandlerResult take(DBusConnection *connection, DBusMessage *message, void *data) {
    DBusMessageIter outer, inner;
    dbus_uint32_t count = 0;
    DBusMessage *reply;
    (void)data;
    if (!dbus_message_is_method_call(message, "com.example.Bench", "Take"))
        return DBUS_HANDLER_RESULT_NOT_YET_HANDLED;
    dbus_message_iter_init(message, &outer);
    dbus_message_iter_recurse(&outer, &inner);
    while (dbus_message_iter_get_arg_type(&inner) == DBUS_TYPE_UNIX_FD) {
        int fd;
        /* A copy, which is the caller's to close. */
        dbus_message_iter_get_basic(&inner, &fd);
        close(fd);
        dbus_message_iter_next(&inner);
        count++;
    }
    reply = dbus_message_new_method_return(message);
    dbus_message_append_args(reply, DBUS_TYPE_UINT32, &count, DBUS_TYPE_INVALID);
    dbus_connection_send(connection, reply, NULL);
    dbus_message_unref(reply);
    return DBUS_HANDLER_RESULT_HANDLED;
}

static DBusConnection *accepted;
static DBusWatch *listening;

static void accept_one(DBusServer *server, DBusConnection *connection, void *data) {
    (void)server, (void)data;
    accepted = dbus_connection_ref(connection);
}

static dbus_bool_t add_watch(DBusWatch *watch, void *data) {
    (void)data;
    listening = watch;
    return TRUE;
}

static void ignore_watch(DBusWatch *watch, void *data) { (void)watch, (void)data; }

/* with_libdbus serve PEER KIND SOCKET NAME */
int main(int count, char **arguments) {
    DBusConnection *connection;
    DBusError error = DBUS_ERROR_INIT;
    char address[256];
    if (count != 6)
        return 1;
    snprintf(address, sizeof address, "unix:path=%s", arguments[4]);
    if (!strcmp(arguments[3], "dbus-bus")) {
        connection = dbus_connection_open_private(address, &error);
        if (!connection || !dbus_bus_register(connection, &error) ||
            dbus_bus_request_name(connection, arguments[5], 0, &error) < 0)
            return 1;
    } else {
        DBusServer *server = dbus_server_listen(address, &error);
        if (!server)
            return 1;
        dbus_server_set_new_connection_function(server, accept_one, NULL, NULL);
        dbus_server_set_watch_functions(server, add_watch, ignore_watch, ignore_watch, NULL, NULL);
        while (!accepted) {
            struct pollfd ready = {dbus_watch_get_unix_fd(listening), POLLIN, 0};
            poll(&ready, 1, -1);
            dbus_watch_handle(listening, DBUS_WATCH_READABLE);
        }
        connection = accepted;
    }
    dbus_connection_set_exit_on_disconnect(connection, FALSE);
    dbus_connection_add_filter(connection, take, NULL, NULL);
    while (dbus_connection_read_write_dispatch(connection, -1))
        ;
    return 0;
}
