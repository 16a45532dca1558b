/* libuv, for the bench: the same small servers and timers as in src/peers/.
 *
 *   cc -O2 with_libuv.c -luv
 *
 * The bench compiles and starts it where libuv's headers are installed. Every
 * connection reads into one buffer of the loop's and writes at once where the
 * socket takes it (uv_try_write), which is how the fastest of its users do it.
 * It cannot be given a descriptor that is no socket, so it has no part in the
 * works that pass those. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

enum { LISTENER = 3, CHUNK = 65536, WRITES = 10, BACKLOG = 4096 };
enum task { DO_ECHO, DO_TEN, DO_SINK, DO_SOURCE };
/* As in src/peers/messages.rs. */
enum { BURST = 32, DATAGRAM = 1200, CHILDREN = 4 };

static uv_loop_t *loop;
static enum task task;
static int is_tcp, takes_descriptors;
static char shared[CHUNK];

/* Memory, counted as the bench's own allocator does. */

static uint64_t live;

static void *counted_malloc(size_t size) {
    void *at = malloc(size);
    live += malloc_usable_size(at);
    return at;
}

static void *counted_calloc(size_t count, size_t size) {
    void *at = calloc(count, size);
    live += malloc_usable_size(at);
    return at;
}

static void *counted_realloc(void *before, size_t size) {
    live -= malloc_usable_size(before);
    void *at = realloc(before, size);
    live += malloc_usable_size(at);
    return at;
}

static void counted_free(void *at) {
    live -= malloc_usable_size(at);
    free(at);
}

static void report(int signal) {
    (void)signal;
    int saved = errno;
    ssize_t written = write(1, &live, sizeof live);
    (void)written;
    errno = saved;
}

/* The servers. */

struct connection {
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    };
    /* Bytes received so far, or still to be sent. */
    uint64_t count;
};

struct rest {
    uv_write_t request;
    char data[];
};

static void produce(struct connection *connection);

static void closed(uv_handle_t *handle) { counted_free(handle); }

static void end(struct connection *connection) {
    if (!uv_is_closing(&connection->handle)) uv_close(&connection->handle, closed);
}

static void rest_written(uv_write_t *request, int status) {
    struct connection *connection = (struct connection *)request->handle;
    counted_free(request);
    if (status < 0) end(connection);
    else if (task == DO_SOURCE) produce(connection);
}

/* Whether all was taken; what was not is kept. */
static int write_all(struct connection *connection, uv_buf_t *buffers, unsigned count) {
    size_t total = 0;
    for (unsigned at = 0; at < count; at++) total += buffers[at].len;
    int written = uv_try_write(&connection->stream, buffers, count);
    size_t sent = written < 0 ? 0 : (size_t)written;
    if (written < 0 && written != UV_EAGAIN) {
        end(connection);
        return 0;
    }
    if (sent == total) return 1;
    struct rest *rest = counted_malloc(sizeof *rest + total - sent);
    size_t to = 0, skip = sent;
    for (unsigned at = 0; at < count; at++) {
        size_t here = skip < buffers[at].len ? skip : buffers[at].len;
        memcpy(rest->data + to, buffers[at].base + here, buffers[at].len - here);
        to += buffers[at].len - here;
        skip -= here;
    }
    uv_buf_t left = uv_buf_init(rest->data, to);
    if (uv_write(&rest->request, &connection->stream, &left, 1, rest_written) < 0) {
        counted_free(rest);
        end(connection);
    }
    return 0;
}

static void produce(struct connection *connection) {
    while (connection->count > 0) {
        size_t length = connection->count < CHUNK ? connection->count : CHUNK;
        uv_buf_t buffer = uv_buf_init(shared, length);
        connection->count -= length;
        /* The callback goes on. */
        if (!write_all(connection, &buffer, 1)) return;
    }
    end(connection);
}

static void answered(uv_write_t *request, int status) {
    (void)status;
    struct connection *connection = (struct connection *)request->handle;
    counted_free(request);
    end(connection);
}

static void give_buffer(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    (void)handle, (void)suggested;
    *buffer = uv_buf_init(shared, sizeof shared);
}

static void received(uv_stream_t *stream, ssize_t length, const uv_buf_t *buffer) {
    struct connection *connection = (struct connection *)stream;
    if (length == 0) return;
    if (length < 0) {
        if (length == UV_EOF && task == DO_SINK) {
            struct rest *answer = counted_malloc(sizeof *answer + sizeof connection->count);
            memcpy(answer->data, &connection->count, sizeof connection->count);
            uv_buf_t number = uv_buf_init(answer->data, sizeof connection->count);
            if (uv_write(&answer->request, stream, &number, 1, answered) == 0) return;
            counted_free(answer);
        }
        end(connection);
        return;
    }
    uv_buf_t buffers[WRITES];
    switch (task) {
    case DO_ECHO:
        buffers[0] = uv_buf_init(buffer->base, length);
        write_all(connection, buffers, 1);
        break;
    case DO_TEN:
        for (int at = 0; at < WRITES; at++) buffers[at] = uv_buf_init(buffer->base, length);
        write_all(connection, buffers, WRITES);
        break;
    case DO_SINK:
        connection->count += length;
        break;
    case DO_SOURCE:
        assert(length == sizeof connection->count);
        memcpy(&connection->count, buffer->base, sizeof connection->count);
        produce(connection);
        break;
    }
}

static struct connection *make(void) {
    struct connection *connection = counted_malloc(sizeof *connection);
    connection->count = 0;
    if (is_tcp) uv_tcp_init(loop, &connection->tcp);
    else uv_pipe_init(loop, &connection->pipe, takes_descriptors);
    return connection;
}

static void connected(uv_stream_t *listener, int status) {
    assert(status == 0);
    struct connection *connection = make();
    if (uv_accept(listener, &connection->stream) == 0)
        uv_read_start(&connection->stream, give_buffer, received);
    else end(connection);
}

/* Datagrams: received by recvmmsg, answered without waiting. */

static char room[20 * CHUNK];
static uint64_t datagrams;

static void give_room(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    (void)handle, (void)suggested;
    *buffer = uv_buf_init(room, sizeof room);
}

static void answer(uv_udp_t *socket, const void *data, size_t length, const struct sockaddr *to) {
    uv_buf_t buffer = uv_buf_init((char *)data, length);
    int sent = uv_udp_try_send(socket, &buffer, 1, to);
    assert(sent == (int)length);
}

static void arrived(uv_udp_t *socket, ssize_t length, const uv_buf_t *buffer,
                    const struct sockaddr *from, unsigned flags) {
    (void)flags;
    if (length <= 0 || from == NULL) return;
    uint64_t count;
    switch (task) {
    case DO_SINK:
        if (++datagrams % BURST == 0) answer(socket, &datagrams, sizeof datagrams, from);
        break;
    case DO_SOURCE:
        memcpy(&count, buffer->base, sizeof count);
        while (count-- > 0) answer(socket, shared, DATAGRAM, from);
        break;
    default:
        answer(socket, buffer->base, length, from);
    }
}

static void serve_datagrams(void) {
    static uv_udp_t socket;
    uv_udp_init_ex(loop, &socket, UV_UDP_RECVMMSG);
    assert(uv_udp_open(&socket, LISTENER) == 0);
    assert(uv_udp_recv_start(&socket, give_room, arrived) == 0);
    assert(write(1, "R", 1) == 1);
    uv_run(loop, UV_RUN_DEFAULT);
}

/* Pipes. */

static void piped(uv_stream_t *stream, ssize_t length, const uv_buf_t *buffer) {
    struct connection *connection = (struct connection *)stream;
    (void)buffer;
    if (length > 0) {
        connection->count += length;
    } else if (length < 0) {
        assert(write(1, &connection->count, sizeof connection->count) == 8);
        end(connection);
    }
}

static void serve_pipe(void) {
    struct connection *connection = counted_malloc(sizeof *connection);
    connection->count = 0;
    uv_pipe_init(loop, &connection->pipe, 0);
    assert(uv_pipe_open(&connection->pipe, LISTENER) == 0);
    assert(write(1, "R", 1) == 1);
    if (task == DO_SOURCE) {
        connection->count = UINT64_MAX;
        produce(connection);
    } else {
        uv_read_start(&connection->stream, give_buffer, piped);
    }
    uv_run(loop, UV_RUN_DEFAULT);
    /* The parent ends it. */
    for (;;) pause();
}

/* Children. */

static size_t children_left;

static void start_child(uv_process_t *child);

static void child_closed(uv_handle_t *handle) {
    if (children_left > 0) start_child((uv_process_t *)handle);
}

static void child_exited(uv_process_t *child, int64_t status, int signal) {
    assert(status == 0 && signal == 0);
    uv_close((uv_handle_t *)child, child_closed);
}

static void start_child(uv_process_t *child) {
    static char program[] = "/bin/true";
    static char *arguments[] = {program, NULL}, *environment[] = {NULL};
    uv_stdio_container_t streams[3];
    for (int at = 0; at < 3; at++) {
        streams[at].flags = UV_INHERIT_FD;
        streams[at].data.fd = at;
    }
    uv_process_options_t options = {
        .exit_cb = child_exited,
        .file = program,
        .args = arguments,
        .env = environment,
        .stdio_count = 3,
        .stdio = streams,
    };
    children_left--;
    assert(uv_spawn(loop, child, &options) == 0);
}

static uint64_t cpu_time(void);

static void spawn(size_t count) {
    static uv_process_t children[CHILDREN];
    uint64_t cpu = cpu_time(), began = uv_hrtime();
    children_left = count;
    for (int at = 0; at < CHILDREN; at++) start_child(&children[at]);
    uv_run(loop, UV_RUN_DEFAULT);
    printf("%f\n%f\n", count * 1e9 / (uv_hrtime() - began), (double)(cpu_time() - cpu) / count);
}

static void serve(void) {
    static struct connection listener;
    signal(SIGUSR1, report);
    if (is_tcp) {
        uv_tcp_init(loop, &listener.tcp);
        uv_tcp_open(&listener.tcp, LISTENER);
    } else {
        uv_pipe_init(loop, &listener.pipe, 0);
        uv_pipe_open(&listener.pipe, LISTENER);
    }
    assert(uv_listen(&listener.stream, BACKLOG, connected) == 0);
    /* The parent waits for it. */
    assert(write(1, "R", 1) == 1);
    uv_run(loop, UV_RUN_DEFAULT);
}

/* One process whose server's turns callgrind counts, as src/drive.rs does. */

__attribute__((noinline)) static void server_turn(void) { uv_run(loop, UV_RUN_NOWAIT); }

static void drive(size_t message, int rounds) {
    enum { CONNECTIONS = 64, WARM_UP = 10 };
    int clients[CONNECTIONS], one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    assert(bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    assert(listen(listener, 1) == 0);
    getsockname(listener, (struct sockaddr *)&address, &length);
    for (int at = 0; at < CONNECTIONS; at++) {
        int pair[2];
        struct connection *connection = make();
        if (is_tcp) {
            pair[0] = socket(AF_INET, SOCK_STREAM, 0);
            assert(connect(pair[0], (struct sockaddr *)&address, sizeof address) == 0);
            pair[1] = accept(listener, NULL, NULL);
            setsockopt(pair[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            setsockopt(pair[1], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            uv_tcp_open(&connection->tcp, pair[1]);
        } else {
            assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            uv_pipe_open(&connection->pipe, pair[1]);
        }
        uv_read_start(&connection->stream, give_buffer, received);
        clients[at] = pair[0];
    }
    char *sent = malloc(message), *answer = malloc(message);
    for (int round = 0; round < WARM_UP + rounds; round++) {
        memset(sent, round, message);
        for (int at = 0; at < CONNECTIONS; at++)
            assert(send(clients[at], sent, message, 0) == (ssize_t)message);
        for (int at = 0; at < CONNECTIONS; at++) {
            while (recv(clients[at], answer, message, MSG_DONTWAIT) < 0) server_turn();
            assert(memcmp(sent, answer, message) == 0);
        }
    }
}

/* Timers, as in src/timers.rs. */

#define MILLISECOND UINT64_C(1000000)
#define SPAN (100 * MILLISECOND)
#define FAR (30000 * MILLISECOND)
enum { BESIDE_PENDING = 100000 };

static uint64_t scattered(uint64_t number) { return number * UINT64_C(0x9E3779B97F4A7C15) >> 8; }
static uint64_t delay_of(uint64_t number) { return scattered(number) % SPAN; }
static uint64_t far_delay_of(uint64_t number) { return FAR + scattered(number) % FAR; }
/* Up, so that none is early. */
static uint64_t milliseconds(uint64_t nanos) { return (nanos + MILLISECOND - 1) / MILLISECOND; }

static uint64_t cpu_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

static size_t fired;
static double *late;

static void fire(uv_timer_t *timer) { (void)timer, fired++; }

static void note(uv_timer_t *timer) {
    late[fired++] = (double)(int64_t)(uv_hrtime() - (uint64_t)(uintptr_t)timer->data) / 1e6;
}

static int ascending(const void *left, const void *right) {
    double difference = *(const double *)left - *(const double *)right;
    return (difference > 0) - (difference < 0);
}

static void timers(const char *timed, size_t count) {
    uint64_t before = cpu_time();
    size_t operations = count;
    /* Each has a place of its own, as in the objects that it belongs to. */
    uv_timer_t *all = malloc(count * sizeof *all);
    uv_update_time(loop);
    if (strcmp(timed, "lateness") == 0) {
        late = malloc(count * sizeof *late);
        for (size_t at = 0; at < count; at++) {
            uv_timer_init(loop, &all[at]);
            all[at].data = (void *)(uintptr_t)(uv_hrtime() + delay_of(at + 1));
            uv_timer_start(&all[at], note, milliseconds(delay_of(at + 1)), 0);
        }
        uv_run(loop, UV_RUN_DEFAULT);
        qsort(late, count, sizeof *late, ascending);
        double sum = 0;
        for (size_t at = 0; at < count; at++) sum += late[at] < 0 ? 0 : late[at];
        printf("%f\n%f\n", sum / count, late[count * 99 / 100]);
        return;
    }
    int is_fire = strcmp(timed, "fire") == 0;
    for (size_t at = 0; at < count; at++) {
        uint64_t delay = is_fire ? delay_of(at + 1) : far_delay_of(at + 1);
        uv_timer_init(loop, &all[at]);
        uv_timer_start(&all[at], fire, milliseconds(delay), 0);
    }
    if (is_fire) {
        uv_run(loop, UV_RUN_DEFAULT);
        assert(fired == count);
    } else if (strcmp(timed, "cancel") == 0) {
        for (size_t at = 0; at < count; at++) uv_timer_stop(&all[at]);
    } else if (strcmp(timed, "reset") == 0) {
        before = cpu_time();
        for (size_t at = 0; at < count; at++)
            uv_timer_start(&all[at], fire, milliseconds(far_delay_of(at + 2)), 0);
    } else {
        uv_timer_t one;
        uv_timer_init(loop, &one);
        operations = BESIDE_PENDING;
        before = cpu_time();
        for (size_t at = 0; at < operations; at++) {
            uv_timer_start(&one, fire, milliseconds(far_delay_of(at + 1)), 0);
            uv_timer_stop(&one);
        }
    }
    printf("%f\n", (double)(cpu_time() - before) / operations);
}

int main(int count, char **arguments) {
    uv_replace_allocator(counted_malloc, counted_realloc, counted_calloc, counted_free);
    loop = uv_default_loop();
    if (count == 5 && strcmp(arguments[1], "time") != 0) count = 0;
    if (count == 5) {
        timers(arguments[3], strtoul(arguments[4], NULL, 10));
        return 0;
    }
    if (count == 4) {
        spawn(strtoul(arguments[3], NULL, 10));
        return 0;
    }
    const char *name = arguments[3];
    task = strcmp(name, "ten") == 0      ? DO_TEN
           : strncmp(name, "sink", 4) == 0 ? DO_SINK
           : strcmp(name, "source") == 0 ? DO_SOURCE
                                         : DO_ECHO;
    takes_descriptors = strcmp(name, "echo-mixin") == 0;
    is_tcp = strcmp(arguments[4], "tcp") == 0;
    if (strcmp(arguments[4], "udp") == 0) serve_datagrams();
    else if (strcmp(arguments[4], "pipe") == 0) serve_pipe();
    else if (strcmp(arguments[1], "serve") == 0) serve();
    else drive(strtoul(arguments[5], NULL, 10), atoi(arguments[6]));
    return 0;
}
