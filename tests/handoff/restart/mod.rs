//! Restarts: a server in processes of its own, restarted while its clients go
//! on.

mod alone;
mod client;
mod faults;
mod hung;
mod moves;
mod paths;
mod pools;
mod server;
mod together;

/// No test, but a server with workers, or one of these.
#[test]
fn pool_process() {
    if let Some(directory) = std::env::var_os(pools::DIRECTORY) {
        pools::run(directory.as_ref());
    }
}

/// No test, but the server: what the other tests start.
#[test]
fn server_process() {
    if let Some(directory) = std::env::var_os(server::DIRECTORY) {
        server::run(directory.as_ref());
    }
}
