//! From an echo server to passing a live connection to another process.
//!
//! Each chapter is a module without items. The chapters build on each other. The tests
//! compile and run every program in them.
//!
//! 1. [An echo server](echo)
//! 2. [Protocols, factories and shared state](protocols)
//! 3. [Time](time)
//! 4. [Producers, consumers and a proxy](producers)
//! 5. [Passing descriptors](descriptors)
//! 6. [Closing](closing)
//! 7. [Pipes, terminals, standard input and output](pipes)
//! 8. [Datagrams](datagrams)
//! 9. [Packets](packets)
//! 10. [TLS](tls)
//! 11. [Child processes](children)
//! 12. [Giving a connection to another process](handoff)
//! 13. [Worker processes](pools)
//! 14. [Restarts, moves and systemd](restarts)
//! 15. [Testing your protocol](testing)
//! 16. [Looking inside](inspect)
//! 17. [Threads, signals, forks and other loops](embedding)
//! 18. [Coming from Twisted](twisted)

#[doc = include_str!("guide/echo.md")]
pub mod echo {}

#[doc = include_str!("guide/protocols.md")]
pub mod protocols {}

#[doc = include_str!("guide/time.md")]
pub mod time {}

#[doc = include_str!("guide/producers.md")]
pub mod producers {}

#[doc = include_str!("guide/descriptors.md")]
pub mod descriptors {}

#[doc = include_str!("guide/closing.md")]
pub mod closing {}

#[doc = include_str!("guide/pipes.md")]
pub mod pipes {}

#[doc = include_str!("guide/datagrams.md")]
pub mod datagrams {}

#[doc = include_str!("guide/packets.md")]
pub mod packets {}

#[cfg(all(feature = "tls", feature = "signals"))]
#[doc = include_str!("guide/tls.md")]
pub mod tls {}

#[doc = include_str!("guide/children.md")]
pub mod children {}

#[doc = include_str!("guide/handoff.md")]
pub mod handoff {}

#[doc = include_str!("guide/pools.md")]
pub mod pools {}

#[doc = include_str!("guide/restarts.md")]
pub mod restarts {}

#[doc = include_str!("guide/testing.md")]
pub mod testing {}

#[cfg(feature = "inspect")]
#[doc = include_str!("guide/inspect.md")]
pub mod inspect {}

#[doc = include_str!("guide/embedding.md")]
pub mod embedding {}

#[doc = include_str!("guide/twisted.md")]
pub mod twisted {}
