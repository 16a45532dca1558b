//! Interfaces as tables: those of the core protocol and of xdg-shell that clients without
//! input need.
//!
//! The signatures are those of `wayland.xml` 1.22 and `xdg-shell.xml` version 5. Later
//! versions append to them.

/// The requests and events of a kind of object.
#[derive(Debug)]
pub struct Interface {
    /// Its name in the registry.
    pub name: &'static str,
    /// The requests of clients, by opcode.
    pub requests: &'static [Signature],
    /// The events of compositors, by opcode.
    pub events: &'static [Signature],
}

/// A request or an event.
#[derive(Debug)]
pub struct Signature {
    /// Its name.
    pub name: &'static str,
    /// Its arguments, one letter each: `i` int, `u` uint, `f` fixed, `s` string, `o`
    /// object, `n` new object, `a` array, `h` descriptor. A string or an object after `?`
    /// may be missing. A new object of any interface is `sun`.
    pub arguments: &'static str,
    /// The interface of the new object, if there is one and its interface is fixed.
    pub creates: Option<&'static Interface>,
    /// Whether it destroys its object.
    pub destroys: bool,
}

impl Signature {
    /// Makes a signature that creates and destroys nothing.
    pub const fn new(name: &'static str, arguments: &'static str) -> Self {
        Self {
            name,
            arguments,
            creates: None,
            destroys: false,
        }
    }

    /// Returns the same signature with a new object of this interface.
    pub const fn creating(mut self, interface: &'static Interface) -> Self {
        self.creates = Some(interface);
        self
    }

    /// Returns the same signature that also destroys its object (`type="destructor"`).
    pub const fn destroying(mut self) -> Self {
        self.destroys = true;
        self
    }

    /// Returns its letters, and whether each argument may be missing.
    pub(super) fn letters(&self) -> impl Iterator<Item = (char, bool)> {
        let mut may_be_missing = false;
        self.arguments.chars().filter_map(move |letter| {
            let before = std::mem::replace(&mut may_be_missing, letter == '?');
            (letter != '?').then_some((letter, before))
        })
    }
}

/// As [`Signature::new`].
const fn message(name: &'static str, arguments: &'static str) -> Signature {
    Signature::new(name, arguments)
}

macro_rules! interfaces {
    ($($(#[$doc:meta])* $constant:ident $name:literal { $($request:expr),* } { $($event:expr),* })*) => {
        $(
            $(#[$doc])*
            pub static $constant: Interface = Interface {
                name: $name,
                requests: &[$($request),*],
                events: &[$($event),*],
            };
        )*
    };
}

interfaces! {
    /// The display: the object 1.
    WL_DISPLAY "wl_display" {
        message("sync", "n").creating(&WL_CALLBACK),
        message("get_registry", "n").creating(&WL_REGISTRY)
    } {
        message("error", "ous"),
        message("delete_id", "u")
    }
    /// The registry, which lists the globals.
    WL_REGISTRY "wl_registry" {
        message("bind", "usun")
    } {
        message("global", "usu"),
        message("global_remove", "u")
    }
    /// A callback, which is called once.
    WL_CALLBACK "wl_callback" {} {
        message("done", "u").destroying()
    }
    /// The compositor, which creates surfaces.
    WL_COMPOSITOR "wl_compositor" {
        message("create_surface", "n").creating(&WL_SURFACE),
        message("create_region", "n").creating(&WL_REGION)
    } {}
    /// Shared memory, which creates pools.
    WL_SHM "wl_shm" {
        message("create_pool", "nhi").creating(&WL_SHM_POOL),
        message("release", "").destroying()
    } {
        message("format", "u")
    }
    /// A pool of shared memory.
    WL_SHM_POOL "wl_shm_pool" {
        message("create_buffer", "niiiiu").creating(&WL_BUFFER),
        message("destroy", "").destroying(),
        message("resize", "i")
    } {}
    /// A buffer: a part of a pool, with the contents of a surface.
    WL_BUFFER "wl_buffer" {
        message("destroy", "").destroying()
    } {
        message("release", "")
    }
    /// A surface, which is shown.
    WL_SURFACE "wl_surface" {
        message("destroy", "").destroying(),
        message("attach", "?oii"),
        message("damage", "iiii"),
        message("frame", "n").creating(&WL_CALLBACK),
        message("set_opaque_region", "?o"),
        message("set_input_region", "?o"),
        message("commit", ""),
        message("set_buffer_transform", "i"),
        message("set_buffer_scale", "i"),
        message("damage_buffer", "iiii"),
        message("offset", "ii")
    } {
        message("enter", "o"),
        message("leave", "o"),
        message("preferred_buffer_scale", "i"),
        message("preferred_buffer_transform", "u")
    }
    /// A region of a surface.
    WL_REGION "wl_region" {
        message("destroy", "").destroying(),
        message("add", "iiii"),
        message("subtract", "iiii")
    } {}
    /// An output: a screen.
    WL_OUTPUT "wl_output" {
        message("release", "").destroying()
    } {
        message("geometry", "iiiiissi"),
        message("mode", "uiii"),
        message("done", ""),
        message("scale", "i"),
        message("name", "s"),
        message("description", "s")
    }
    /// Creates windows.
    XDG_WM_BASE "xdg_wm_base" {
        message("destroy", "").destroying(),
        message("create_positioner", "n").creating(&XDG_POSITIONER),
        message("get_xdg_surface", "no").creating(&XDG_SURFACE),
        message("pong", "u")
    } {
        message("ping", "u")
    }
    /// The position of a popup.
    XDG_POSITIONER "xdg_positioner" {
        message("destroy", "").destroying(),
        message("set_size", "ii"),
        message("set_anchor_rect", "iiii"),
        message("set_anchor", "u"),
        message("set_gravity", "u"),
        message("set_constraint_adjustment", "u"),
        message("set_offset", "ii"),
        message("set_reactive", ""),
        message("set_parent_size", "ii"),
        message("set_parent_configure", "u")
    } {}
    /// A surface that is a window or a popup.
    XDG_SURFACE "xdg_surface" {
        message("destroy", "").destroying(),
        message("get_toplevel", "n").creating(&XDG_TOPLEVEL),
        message("get_popup", "n?oo").creating(&XDG_POPUP),
        message("set_window_geometry", "iiii"),
        message("ack_configure", "u")
    } {
        message("configure", "u")
    }
    /// A window.
    XDG_TOPLEVEL "xdg_toplevel" {
        message("destroy", "").destroying(),
        message("set_parent", "?o"),
        message("set_title", "s"),
        message("set_app_id", "s"),
        message("show_window_menu", "ouii"),
        message("move", "ou"),
        message("resize", "ouu"),
        message("set_max_size", "ii"),
        message("set_min_size", "ii"),
        message("set_maximized", ""),
        message("unset_maximized", ""),
        message("set_fullscreen", "?o"),
        message("unset_fullscreen", ""),
        message("set_minimized", "")
    } {
        message("configure", "iia"),
        message("close", ""),
        message("configure_bounds", "ii"),
        message("wm_capabilities", "a")
    }
    /// A popup.
    XDG_POPUP "xdg_popup" {
        message("destroy", "").destroying(),
        message("grab", "ou"),
        message("reposition", "ou")
    } {
        message("configure", "iiii"),
        message("popup_done", ""),
        message("repositioned", "u")
    }
}
