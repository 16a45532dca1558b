//! From an echo server to a service that is replaced under load.
//!
//! Each chapter is a module without items. The chapters build on each other. The tests
//! compile and run every program in them. Programs use `bowline` with the feature
//! `signals`, and nothing else.
//!
//! 1. [An echo server](echo)
//! 2. [Protocols, factories and shared state](protocols)
//! 3. [A chat server, whole](chat)
//! 4. [Lines and messages](framing)
//! 5. [Time](time)
//! 6. [Producers, consumers and a proxy](producers)
//! 7. [HTTP, whole](http)
//! 8. [Closing](closing)
//! 9. [Stopping](stopping)
//! 10. [Passing descriptors](descriptors)
//! 11. [Pipes, terminals, standard input and output](pipes)
//! 12. [Datagrams](datagrams)
//! 13. [Packets](packets)
//! 14. [TLS](tls)
//! 15. [Child processes](children)
//! 16. [Giving a connection to another process](handoff)
//! 17. [Worker processes](pools)
//! 18. [Restarts, moves and systemd](restarts)
//! 19. [Workers and restarts together, under systemd](services)
//! 20. [A chat on several machines](machines)
//! 21. [A broker, and subscribers that do not read](pubsub)
//! 22. [Deploying](deploying)
//! 23. [Security](security)
//! 24. [Performance](performance)
//! 25. [Testing your protocol](testing)
//! 26. [Looking inside](inspect)
//! 27. [Threads, signals, forks and other loops](embedding)
//! 28. [Descriptors of your own, and of others](own)
//! 29. [Coming from Twisted](twisted)
//! 30. [Choosing](choosing)
//! 31. [What each kind can do](kinds)
//! 32. [Everything by task](tasks)
//! 33. [Words](words)

#[doc = include_str!("guide/echo.md")]
pub mod echo {}

#[doc = include_str!("guide/protocols.md")]
pub mod protocols {}

#[doc = include_str!("guide/chat.md")]
pub mod chat {}

#[doc = include_str!("guide/framing.md")]
pub mod framing {}

#[doc = include_str!("guide/time.md")]
pub mod time {}

#[doc = include_str!("guide/producers.md")]
pub mod producers {}

#[doc = include_str!("guide/http.md")]
pub mod http {}

#[doc = include_str!("guide/closing.md")]
pub mod closing {}

#[doc = include_str!("guide/stopping.md")]
pub mod stopping {}

#[doc = include_str!("guide/descriptors.md")]
pub mod descriptors {}

#[doc = include_str!("guide/pipes.md")]
pub mod pipes {}

#[doc = include_str!("guide/datagrams.md")]
pub mod datagrams {}

#[doc = include_str!("guide/packets.md")]
pub mod packets {}

#[cfg_attr(all(feature = "tls", feature = "signals"), doc = include_str!("guide/tls.md"))]
#[cfg_attr(
    not(all(feature = "tls", feature = "signals")),
    doc = "TLS. Build the documentation with the features `tls` and `signals` to read it."
)]
pub mod tls {}

#[doc = include_str!("guide/children.md")]
pub mod children {}

#[doc = include_str!("guide/handoff.md")]
pub mod handoff {}

#[doc = include_str!("guide/pools.md")]
pub mod pools {}

#[doc = include_str!("guide/restarts.md")]
pub mod restarts {}

#[doc = include_str!("guide/services.md")]
pub mod services {}

#[doc = include_str!("guide/machines.md")]
pub mod machines {}

#[doc = include_str!("guide/pubsub.md")]
#[doc = include_str!("pictures/pubsub.md")]
pub mod pubsub {}

#[doc = include_str!("guide/deploying.md")]
pub mod deploying {}

#[doc = include_str!("guide/security.md")]
pub mod security {}

#[doc = include_str!("guide/performance.md")]
pub mod performance {}

#[cfg_attr(feature = "testing", doc = include_str!("guide/testing.md"))]
#[cfg_attr(
    not(feature = "testing"),
    doc = "Testing. Build the documentation with the feature `testing` to read it."
)]
pub mod testing {}

#[cfg_attr(feature = "inspect", doc = include_str!("guide/inspect.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/page.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/phone.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/restart.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/pool.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/made.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/growing.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/paused.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/slow.md"))]
#[cfg_attr(feature = "inspect", doc = include_str!("pictures/again.md"))]
#[cfg_attr(
    not(feature = "inspect"),
    doc = "Looking inside. Build the documentation with the feature `inspect` to read it."
)]
pub mod inspect {}

#[doc = include_str!("guide/embedding.md")]
pub mod embedding {}

#[doc = include_str!("guide/own.md")]
pub mod own {}

#[doc = include_str!("guide/twisted.md")]
pub mod twisted {}

#[doc = include_str!("guide/choosing.md")]
pub mod choosing {}

#[doc = include_str!("guide/kinds.md")]
pub mod kinds {}

#[doc = include_str!("guide/tasks.md")]
pub mod tasks {}

#[doc = include_str!("guide/words.md")]
pub mod words {}
