/* A compositor that takes surfaces and pools and shows nothing, on libwayland, for the
 * bench. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <wayland-server.h>

static struct wl_resource *waiting[64];
static int waits;
static uint64_t seen;

static void destroy(struct wl_client *client, struct wl_resource *resource) {
    (void)client;
    wl_resource_destroy(resource);
}

static void attach(struct wl_client *client, struct wl_resource *resource,
                   struct wl_resource *buffer, int32_t x, int32_t y) {
    (void)client, (void)resource, (void)x, (void)y;
    seen += buffer != NULL;
}

static void damage(struct wl_client *client, struct wl_resource *resource, int32_t x, int32_t y,
                   int32_t width, int32_t height) {
    (void)client, (void)resource, (void)x, (void)y, (void)height;
    seen += width;
}

static void frame(struct wl_client *client, struct wl_resource *resource, uint32_t id) {
    (void)resource;
    waiting[waits++] = wl_resource_create(client, &wl_callback_interface, 1, id);
}

static void region(struct wl_client *client, struct wl_resource *resource,
                   struct wl_resource *which) {
    (void)client, (void)resource, (void)which;
}

static void commit(struct wl_client *client, struct wl_resource *resource) {
    int at;
    (void)client, (void)resource;
    for (at = 0; at < waits; at++) {
        wl_callback_send_done(waiting[at], 1);
        wl_resource_destroy(waiting[at]);
    }
    waits = 0;
}

static void number(struct wl_client *client, struct wl_resource *resource, int32_t value) {
    (void)client, (void)resource, (void)value;
}

static const struct wl_surface_interface surface = {
    .destroy = destroy,
    .attach = attach,
    .damage = damage,
    .frame = frame,
    .set_opaque_region = region,
    .set_input_region = region,
    .commit = commit,
    .set_buffer_transform = number,
    .set_buffer_scale = number,
    .damage_buffer = damage,
};

static void create_surface(struct wl_client *client, struct wl_resource *resource, uint32_t id) {
    struct wl_resource *made =
        wl_resource_create(client, &wl_surface_interface, wl_resource_get_version(resource), id);
    wl_resource_set_implementation(made, &surface, NULL, NULL);
}

static const struct wl_compositor_interface compositor = {.create_surface = create_surface};

static const struct wl_shm_pool_interface pool = {.destroy = destroy, .resize = number};

static void create_pool(struct wl_client *client, struct wl_resource *resource, uint32_t id,
                        int32_t fd, int32_t size) {
    struct wl_resource *made = wl_resource_create(client, &wl_shm_pool_interface, 1, id);
    (void)resource, (void)size;
    close(fd);
    wl_resource_set_implementation(made, &pool, NULL, NULL);
}

static const struct wl_shm_interface shm = {.create_pool = create_pool};

static void bind_compositor(struct wl_client *client, void *data, uint32_t version, uint32_t id) {
    struct wl_resource *made = wl_resource_create(client, &wl_compositor_interface, version, id);
    (void)data;
    wl_resource_set_implementation(made, &compositor, NULL, NULL);
}

static void bind_shm(struct wl_client *client, void *data, uint32_t version, uint32_t id) {
    struct wl_resource *made = wl_resource_create(client, &wl_shm_interface, version, id);
    (void)data;
    wl_resource_set_implementation(made, &shm, NULL, NULL);
}

/* with_libwayland serve PEER KIND SOCKET NAME */
int main(int count, char **arguments) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct wl_display *display = wl_display_create();
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (count != 6 || !display)
        return 1;
    wl_global_create(display, &wl_compositor_interface, 4, NULL, bind_compositor);
    wl_global_create(display, &wl_shm_interface, 1, NULL, bind_shm);
    strncpy(address.sun_path, arguments[4], sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8) ||
        wl_display_add_socket_fd(display, listener))
        return 1;
    wl_display_run(display);
    return 0;
}
