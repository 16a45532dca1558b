//! Threads that begin in a forked child too.
//!
//! std keeps a list of its threads, for what it says of a stack overflow, under a lock
//! that each of them takes when it begins and when it ends. If another thread does
//! either at the moment of a fork, the child has the lock as it was: taken, for good. No
//! thread of std's runs there then. The C library makes its own locks anew, so what is
//! started by itself does run.
//!
//! References: pthread_create(3), fork(2).

use std::io;
use std::mem::{self, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use super::fork::known_generation;

type Run = Box<dyn FnOnce() + Send>;

/// A thread that was started by [`start_thread`]. It goes on if this is dropped.
#[derive(Debug)]
pub struct Thread(Kind);

#[derive(Debug)]
enum Kind {
    Std(JoinHandle<()>),
    Plain(Plain),
}

#[derive(Debug)]
struct Plain {
    thread: libc::pthread_t,
    is_over: Arc<AtomicBool>,
}

/// Starts a thread with this name, of at most 15 bytes, and this much stack, or as much
/// as std gives. Unlike std's, it begins in a [forked](crate::forks) child too.
///
/// # Errors
/// Those of pthread_create(3).
pub fn start_thread(
    name: &'static str,
    stack_bytes: Option<usize>,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<Thread> {
    if known_generation() == 0 {
        let mut builder = Builder::new().name(name.to_owned());
        if let Some(bytes) = stack_bytes {
            builder = builder.stack_size(bytes);
        }
        return builder.spawn(run).map(Kind::Std).map(Thread);
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let run = Box::new(move || {
        set_name(name);
        // The caller says what it makes of a panic; here it would be an abort.
        let _ = catch_unwind(AssertUnwindSafe(run));
        over.store(true, Ordering::Release);
    });
    let thread = create(stack_bytes.unwrap_or(USUAL_STACK_BYTES), run)?;
    Ok(Thread(Kind::Plain(Plain { thread, is_over })))
}

/// What std gives.
const USUAL_STACK_BYTES: usize = 2 << 20;

impl Thread {
    /// Whether it has done all it was started for.
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Kind::Std(thread) => thread.is_finished(),
            Kind::Plain(plain) => plain.is_over.load(Ordering::Acquire),
        }
    }

    /// Waits until it has ended.
    pub fn join(self) {
        match self.0 {
            Kind::Std(thread) => drop(thread.join()),
            Kind::Plain(plain) => {
                let thread = plain.thread;
                mem::forget(plain);
                // SAFETY: it was created joinable and is neither joined nor detached
                // yet, which only this and the drop that was prevented do.
                unsafe { libc::pthread_join(thread, ptr::null_mut()) };
            }
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: it was created joinable, and is neither joined nor detached yet.
        unsafe { libc::pthread_detach(self.thread) };
    }
}

fn create(stack_bytes: usize, run: Run) -> io::Result<libc::pthread_t> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: writes to `attributes`, which is borrowed for that.
    check(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
    // SAFETY: the call before has made them attributes. A size that is refused, for
    // being too small, leaves the usual one.
    unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack_bytes) };
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    let run = Box::into_raw(Box::new(run));
    // SAFETY: the attributes are some; `main` takes what it is given here, once; and
    // what is given away may go to another thread, by its type.
    let result =
        unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), main, run.cast()) };
    // SAFETY: they were made above, and nobody uses them any more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    if let Err(error) = check(result) {
        // SAFETY: it was made of a box above, and no thread has it.
        drop(unsafe { Box::from_raw(run) });
        return Err(error);
    }
    // SAFETY: the call has succeeded, and so has written it.
    Ok(unsafe { thread.assume_init() })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

extern "C" fn main(run: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: it was made of a box of this type for this thread, which takes it once.
    let run = unsafe { Box::from_raw(run.cast::<Run>()) };
    run();
    ptr::null_mut()
}

fn set_name(name: &str) {
    let mut bytes = [0_u8; 16];
    let length = name.len().min(bytes.len() - 1);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    // SAFETY: takes nothing.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: this thread is there, and of the bytes that are read the last is a zero.
    unsafe { libc::pthread_setname_np(this, bytes.as_ptr().cast()) };
}
