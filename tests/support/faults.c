/* Counts the calls of libc that a process makes, and has some of them fail.
 *
 * Preloaded (LD_PRELOAD) into a process, it stands between libc and everybody
 * who uses it: bowline, mio and std alike. What it does is written by a test
 * into the file that BOWLINE_FAULTS names, which is mapped, so it can change at
 * any moment; tests/support/faults.rs is the other side of it. Nothing happens
 * while the first word is zero.
 *
 * Injected faults are ones that a kernel could answer. "Would block" of a
 * watched descriptor is followed by an event, and so is a read that was cut
 * short, as if the rest had arrived just afterwards; close() closes, whatever
 * it answers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* In the order of `CALLS` in faults.rs. */
enum call {
    ACCEPT, BIND, CLOSE, CONNECT, DUP2, EPOLL_CREATE, EPOLL_CTL, EPOLL_WAIT,
    EVENTFD, EXEC, FCHMOD, FCNTL, FORK, GETPEERNAME, GETSOCKNAME, GETSOCKOPT,
    IOCTL, LISTEN, OPEN, PIPE, READ, RECV, RECVMMSG, RECVMSG, SEND, SENDMMSG,
    SENDMSG, SETSOCKOPT, SHUTDOWN, SOCKET, TIMERFD_CREATE, TIMERFD_SETTIME, UNLINK, WAIT, WRITE, CALLS
};

struct control {
    uint32_t is_armed;
    /* The calls number `nth` and following, `times` of them, fail with `error`;
     * `call` counts from one. */
    uint32_t call, nth, times, error;
    /* Of a hundred calls that move bytes, accept or wait, this many are
     * interrupted, put off or cut short; chosen by `seed`. */
    uint32_t storm_percent, seed;
    uint32_t fired;
    uint32_t counts[CALLS];
};

enum { MOST_DESCRIPTORS = 65536 };

static volatile struct control *control;
/* How descriptors are watched, to raise events for them. */
static struct { int epoll; int is_watched; struct epoll_event event; } watched[MOST_DESCRIPTORS];
/* Which ones are the loop's own counters: of these alone read() and write() are
 * its calls. */
static unsigned char is_counter[MOST_DESCRIPTORS];

static int in_range(int fd) { return fd >= 0 && fd < MOST_DESCRIPTORS; }

#define REAL(name)                                                             \
    static __typeof__(&name) real;                                             \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("BOWLINE_FAULTS");
    if (!path) return;
    int fd = (int)open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) control = mapped;
}

/* The error that this call is to fail with, or zero. */
static int fault(enum call call) {
    volatile struct control *c = control;
    if (!c || !c->is_armed) return 0;
    uint32_t n = __atomic_fetch_add(&c->counts[call], 1, __ATOMIC_RELAXED);
    if (c->call != (uint32_t)call + 1 || n < c->nth || n - c->nth >= c->times) return 0;
    __atomic_fetch_add(&c->fired, 1, __ATOMIC_RELAXED);
    return (int)c->error;
}

static uint32_t any(void) {
    /* xorshift32; several threads may well take the same number. */
    uint32_t x = control->seed | 1;
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    control->seed = x;
    return x;
}

/* Whether the storm hits this call. */
static int is_hit(void) {
    volatile struct control *c = control;
    if (!c || !c->is_armed || !c->storm_percent || any() % 100 >= c->storm_percent) return 0;
    __atomic_fetch_add(&c->fired, 1, __ATOMIC_RELAXED);
    return 1;
}

static int real_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    REAL(epoll_ctl);
    return real(epoll, operation, fd, event);
}

/* Raises what the descriptor is ready for once more. */
static void raise_again(int fd) {
    if (!in_range(fd) || !watched[fd].is_watched) return;
    int before = errno;
    struct epoll_event event = watched[fd].event;
    real_epoll_ctl(watched[fd].epoll, EPOLL_CTL_MOD, fd, &event);
    errno = before;
}

#define FAIL(error) return errno = (error), -1

/* Fails a call that may be put off: an event follows. */
#define FAIL_LATER(fd, error)                                                  \
    do {                                                                       \
        int error_ = (error);                                                  \
        if (error_ == EAGAIN) raise_again(fd);                                 \
        FAIL(error_);                                                          \
    } while (0)

/* What the storm does to a call: nothing, an error, or a length. */
#define STORM(fd, length)                                                      \
    do {                                                                       \
        if (is_hit()) {                                                        \
            uint32_t choice = any() % 4;                                       \
            if (choice == 0) FAIL(EINTR);                                      \
            if (choice == 1) FAIL_LATER(fd, EAGAIN);                           \
            if ((length) > 1) (length) = 1 + any() % (uint32_t)((length) - 1); \
        }                                                                      \
    } while (0)

#define SIMPLE(CALL, type, name, parameters, arguments)                        \
    type name parameters {                                                     \
        REAL(name);                                                            \
        int error = fault(CALL);                                               \
        if (error) FAIL(error);                                                \
        return real arguments;                                                 \
    }

SIMPLE(BIND, int, bind, (int fd, const struct sockaddr *name, socklen_t length), (fd, name, length))
SIMPLE(DUP2, int, dup2, (int from, int to), (from, to))
SIMPLE(EPOLL_CREATE, int, epoll_create1, (int flags), (flags))
SIMPLE(EXEC, int, execvp, (const char *file, char *const *arguments), (file, arguments))
SIMPLE(FCHMOD, int, fchmod, (int fd, mode_t mode), (fd, mode))
SIMPLE(FORK, pid_t, fork, (void), ())
SIMPLE(GETSOCKNAME, int, getsockname, (int fd, struct sockaddr *name, socklen_t *length), (fd, name, length))
SIMPLE(GETSOCKOPT, int, getsockopt, (int fd, int level, int option, void *value, socklen_t *length), (fd, level, option, value, length))
SIMPLE(LISTEN, int, listen, (int fd, int backlog), (fd, backlog))
SIMPLE(PIPE, int, pipe2, (int fds[2], int flags), (fds, flags))
SIMPLE(SETSOCKOPT, int, setsockopt, (int fd, int level, int option, const void *value, socklen_t length), (fd, level, option, value, length))
SIMPLE(SHUTDOWN, int, shutdown, (int fd, int how), (fd, how))
SIMPLE(SOCKET, int, socket, (int domain, int type, int protocol), (domain, type, protocol))
SIMPLE(TIMERFD_SETTIME, int, timerfd_settime, (int fd, int flags, const struct itimerspec *value, struct itimerspec *old), (fd, flags, value, old))
SIMPLE(UNLINK, int, unlink, (const char *path), (path))
SIMPLE(WAIT, pid_t, waitpid, (pid_t child, int *status, int options), (child, status, options))

int connect(int fd, const struct sockaddr *name, socklen_t length) {
    REAL(connect);
    int error = fault(CONNECT);
    /* An IP connection that was interrupted goes on by itself. */
    if (error == EINTR && name->sa_family != AF_UNIX) real(fd, name, length);
    if (error) FAIL(error);
    return real(fd, name, length);
}

int getpeername(int fd, struct sockaddr *name, socklen_t *length) {
    REAL(getpeername);
    int error = fault(GETPEERNAME);
    /* Not yet, that is. */
    if (error == ENOTCONN) raise_again(fd);
    if (error) FAIL(error);
    return real(fd, name, length);
}

int accept4(int fd, struct sockaddr *name, socklen_t *length, int flags) {
    REAL(accept4);
    int error = fault(ACCEPT);
    uint32_t nothing = 0;
    if (error) FAIL_LATER(fd, error);
    STORM(fd, nothing);
    return real(fd, name, length, flags);
}

int close(int fd) {
    REAL(close);
    int error = fault(CLOSE);
    if (in_range(fd)) watched[fd].is_watched = is_counter[fd] = 0;
    int result = real(fd);
    if (error && result == 0) FAIL(error);
    return result;
}

static int counter(int fd) {
    if (in_range(fd)) is_counter[fd] = 1;
    return fd;
}

int eventfd(unsigned int value, int flags) {
    REAL(eventfd);
    int error = fault(EVENTFD);
    if (error) FAIL(error);
    return counter(real(value, flags));
}

int timerfd_create(int clock, int flags) {
    REAL(timerfd_create);
    int error = fault(TIMERFD_CREATE);
    if (error) FAIL(error);
    return counter(real(clock, flags));
}

ssize_t read(int fd, void *data, size_t length) {
    REAL(read);
    int error = in_range(fd) && is_counter[fd] ? fault(READ) : 0;
    if (error) FAIL(error);
    return real(fd, data, length);
}

ssize_t write(int fd, const void *data, size_t length) {
    REAL(write);
    int error = in_range(fd) && is_counter[fd] ? fault(WRITE) : 0;
    if (error) FAIL(error);
    return real(fd, data, length);
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    int error = fault(EPOLL_CTL);
    if (error) FAIL(error);
    int result = real_epoll_ctl(epoll, operation, fd, event);
    if (result == 0 && in_range(fd)) {
        watched[fd].is_watched = operation != EPOLL_CTL_DEL;
        watched[fd].epoll = epoll;
        if (event) watched[fd].event = *event;
    }
    return result;
}

int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout) {
    REAL(epoll_wait);
    int error = fault(EPOLL_WAIT);
    if (error) FAIL(error);
    if (is_hit()) {
        if (any() % 2) FAIL(EINTR);
        most = 1 + any() % most;
    }
    return real(epoll, events, most, timeout);
}

/* A read that was cut may have left something: its event is still to come. */
#define CUT_READ(fd, asked, length, result)                                    \
    do {                                                                       \
        if ((length) < (asked) && (result) == (ssize_t)(length)) raise_again(fd); \
    } while (0)

ssize_t recv(int fd, void *data, size_t asked, int flags) {
    REAL(recv);
    int error = fault(RECV);
    if (error) FAIL_LATER(fd, error);
    size_t length = asked;
    STORM(fd, length);
    ssize_t result = real(fd, data, length, flags);
    CUT_READ(fd, asked, length, result);
    return result;
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    REAL(recvmsg);
    int error = fault(RECVMSG);
    if (error) FAIL_LATER(fd, error);
    if (message->msg_iovlen != 1) return real(fd, message, flags);
    size_t asked = message->msg_iov[0].iov_len, length = asked;
    STORM(fd, length);
    message->msg_iov[0].iov_len = length;
    ssize_t result = real(fd, message, flags);
    message->msg_iov[0].iov_len = asked;
    CUT_READ(fd, asked, length, result);
    return result;
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags, struct timespec *timeout) {
    REAL(recvmmsg);
    int error = fault(RECVMMSG);
    if (error) FAIL_LATER(fd, error);
    return real(fd, messages, count, flags, timeout);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags) {
    REAL(sendmmsg);
    int error = fault(SENDMMSG);
    if (error) FAIL_LATER(fd, error);
    return real(fd, messages, count, flags);
}

/* One message in the place of several. Sockets of tests say of no call that it is not to
 * block. */
ssize_t sendto(int fd, const void *data, size_t length, int flags, const struct sockaddr *name,
               socklen_t name_length) {
    REAL(sendto);
    int error = flags & MSG_DONTWAIT ? fault(SENDMMSG) : 0;
    if (error) FAIL_LATER(fd, error);
    return real(fd, data, length, flags, name, name_length);
}

ssize_t send(int fd, const void *data, size_t length, int flags) {
    REAL(send);
    int error = fault(SEND);
    if (error) FAIL_LATER(fd, error);
    STORM(fd, length);
    return real(fd, data, length, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(sendmsg);
    int error = fault(SENDMSG);
    if (error) FAIL_LATER(fd, error);
    if (message->msg_iovlen < 1) return real(fd, message, flags);
    size_t length = message->msg_iov[0].iov_len;
    struct iovec first = message->msg_iov[0];
    STORM(fd, length);
    if (length == first.iov_len) return real(fd, message, flags);
    struct msghdr cut = *message;
    first.iov_len = length;
    cut.msg_iov = &first;
    cut.msg_iovlen = 1;
    return real(fd, &cut, flags);
}

/* Those with one argument that may be absent; a long holds either kind. */
#define OPTIONAL(last)                                                         \
    va_list list_;                                                             \
    va_start(list_, last);                                                     \
    long argument = va_arg(list_, long);                                       \
    va_end(list_)

int fcntl(int fd, int command, ...) {
    REAL(fcntl);
    OPTIONAL(command);
    /* std asks this before it closes, in debug builds, to find double closes. */
    int error = command == F_GETFD ? 0 : fault(FCNTL);
    if (error) FAIL(error);
    return real(fd, command, argument);
}

int ioctl(int fd, unsigned long request, ...) {
    static int (*real)(int, unsigned long, ...);
    if (!real) real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    OPTIONAL(request);
    int error = fault(IOCTL);
    if (error) FAIL(error);
    return real(fd, request, argument);
}

int open64(const char *path, int flags, ...) {
    REAL(open64);
    OPTIONAL(flags);
    int error = fault(OPEN);
    if (error) FAIL(error);
    return real(path, flags, argument);
}
