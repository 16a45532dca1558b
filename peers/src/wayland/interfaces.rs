//! Interfaces as tables, and those that clients without input need: of the core protocol,
//! and of xdg-shell.
//!
//! The signatures are those of `wayland.xml` 1.22 and `xdg-shell.xml` version 5. Later
//! versions add behind them.

/// What requests and events objects of a kind have.
#[derive(Debug)]
pub struct Interface {
    /// Its name, as the registry says it.
    pub name: &'static str,
    /// What clients ask, by opcode.
    pub requests: &'static [Signature],
    /// What compositors say, by opcode.
    pub events: &'static [Signature],
}

/// A request or an event.
#[derive(Debug)]
pub struct Signature {
    /// Its name.
    pub name: &'static str,
    /// Its arguments, a letter each: `i` int, `u` uint, `f` fixed, `s` string, `o` object,
    /// `n` new object, `a` array, `h` descriptor. A `?` in front lets a string or an object
    /// be missing. A new object of any interface is `sun`.
    pub arguments: &'static str,
    /// Of which interface the new object is, if there is one of a known interface.
    pub creates: Option<&'static Interface>,
    /// Whether the object is gone with it.
    pub destroys: bool,
}

impl Signature {
    /// One that creates and destroys nothing.
    pub const fn new(name: &'static str, arguments: &'static str) -> Self {
        Self {
            name,
            arguments,
            creates: None,
            destroys: false,
        }
    }

    /// The same with a new object of this interface.
    pub const fn creating(mut self, interface: &'static Interface) -> Self {
        self.creates = Some(interface);
        self
    }

    /// The same, and its own object is gone with it (`type="destructor"`).
    pub const fn destroying(mut self) -> Self {
        self.destroys = true;
        self
    }

    /// Its letters, and whether each may be missing.
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
    /// The object 1.
    WL_DISPLAY "wl_display" {
        message("sync", "n").creating(&WL_CALLBACK),
        message("get_registry", "n").creating(&WL_REGISTRY)
    } {
        message("error", "ous"),
        message("delete_id", "u")
    }
    /// What there is.
    WL_REGISTRY "wl_registry" {
        message("bind", "usun")
    } {
        message("global", "usu"),
        message("global_remove", "u")
    }
    /// Told once.
    WL_CALLBACK "wl_callback" {} {
        message("done", "u").destroying()
    }
    /// Makes surfaces.
    WL_COMPOSITOR "wl_compositor" {
        message("create_surface", "n").creating(&WL_SURFACE),
        message("create_region", "n").creating(&WL_REGION)
    } {}
    /// Makes pools of shared memory.
    WL_SHM "wl_shm" {
        message("create_pool", "nhi").creating(&WL_SHM_POOL),
        message("release", "").destroying()
    } {
        message("format", "u")
    }
    /// Memory that is shared.
    WL_SHM_POOL "wl_shm_pool" {
        message("create_buffer", "niiiiu").creating(&WL_BUFFER),
        message("destroy", "").destroying(),
        message("resize", "i")
    } {}
    /// A part of it, with what is to be shown.
    WL_BUFFER "wl_buffer" {
        message("destroy", "").destroying()
    } {
        message("release", "")
    }
    /// Where something is shown.
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
    /// A part of a surface.
    WL_REGION "wl_region" {
        message("destroy", "").destroying(),
        message("add", "iiii"),
        message("subtract", "iiii")
    } {}
    /// A screen.
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
    /// Makes windows.
    XDG_WM_BASE "xdg_wm_base" {
        message("destroy", "").destroying(),
        message("create_positioner", "n").creating(&XDG_POSITIONER),
        message("get_xdg_surface", "no").creating(&XDG_SURFACE),
        message("pong", "u")
    } {
        message("ping", "u")
    }
    /// Where a popup goes.
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
