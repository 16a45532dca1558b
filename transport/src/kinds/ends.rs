//! The addresses of both ends of a TCP connection: 16 bytes for IPv4, and a box for others.
//!
//! Two [`SocketAddr`]s take 64 bytes. That is more than half of all that an idle
//! connection has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The peer's address, and ours once it is known.
#[derive(Clone, Debug)]
pub(super) enum Ends {
    Short(Short),
    Wide(Box<Wide>),
}

/// Two ends of IPv4, as that is written or as IPv6 writes it (`::ffff:192.0.2.1`), which
/// is what a listener of both sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    is_mapped: bool,
    /// Whether our address was asked for.
    has_host: bool,
    peer_port: u16,
    host_port: u16,
    peer: [u8; 4],
    host: [u8; 4],
}

/// Any two ends.
///
/// For IPv6 the kernel gives no flow label of our end. It gives a scope only for
/// link-local addresses, and both ends of these are on one interface (`inet6_getname`).
/// So one scope is enough.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    peer: [u8; 16],
    host: [u8; 16],
    peer_flow: u32,
    scope: u32,
    peer_port: u16,
    host_port: u16,
    peer_family: Family,
    /// `None` until our address was asked for.
    host_family: Option<Family>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Ends {
    pub(super) fn new(peer: SocketAddr, host: Option<SocketAddr>) -> Self {
        let mut ends = match ipv4_of(peer) {
            Some((is_mapped, ip)) => Self::Short(Short {
                is_mapped,
                has_host: false,
                peer_port: peer.port(),
                host_port: 0,
                peer: ip,
                host: [0; 4],
            }),
            None => Self::Wide(Box::new(Wide::new(peer))),
        };
        if let Some(host) = host {
            ends.set_host(host);
        }
        ends
    }

    pub(super) fn peer(&self) -> SocketAddr {
        match self {
            Self::Short(ends) => ends.address(ends.peer, ends.peer_port),
            Self::Wide(ends) => ends.peer(),
        }
    }

    pub(super) fn host(&self) -> Option<SocketAddr> {
        match self {
            Self::Short(ends) => ends
                .has_host
                .then(|| ends.address(ends.host, ends.host_port)),
            Self::Wide(ends) => ends.host(),
        }
    }

    pub(super) fn set_host(&mut self, host: SocketAddr) {
        match (self, ipv4_of(host)) {
            (Self::Short(ends), Some((is_mapped, ip))) if is_mapped == ends.is_mapped => {
                (ends.has_host, ends.host, ends.host_port) = (true, ip, host.port());
            }
            (Self::Wide(ends), _) => ends.set_host(host),
            (ends, _) => {
                let mut wide = Wide::new(ends.peer());
                wide.set_host(host);
                *ends = Self::Wide(Box::new(wide));
            }
        }
    }
}

/// The bytes of an address of IPv4, and whether it is written as one of IPv6.
fn ipv4_of(address: SocketAddr) -> Option<(bool, [u8; 4])> {
    match address {
        SocketAddr::V4(address) => Some((false, address.ip().octets())),
        SocketAddr::V6(address) => {
            let is_plain = address.flowinfo() == 0 && address.scope_id() == 0;
            let ip = address.ip().to_ipv4_mapped().filter(|_| is_plain)?;
            Some((true, ip.octets()))
        }
    }
}

impl Short {
    fn address(&self, ip: [u8; 4], port: u16) -> SocketAddr {
        let ip = Ipv4Addr::from(ip);
        match self.is_mapped {
            true => SocketAddr::new(ip.to_ipv6_mapped().into(), port),
            false => SocketAddr::new(ip.into(), port),
        }
    }
}

impl Wide {
    fn new(peer: SocketAddr) -> Self {
        let (peer_family, bytes) = packed(peer.ip());
        let (peer_flow, scope) = match peer {
            SocketAddr::V6(peer) => (peer.flowinfo(), peer.scope_id()),
            SocketAddr::V4(_) => (0, 0),
        };
        Self {
            peer: bytes,
            host: [0; 16],
            peer_flow,
            scope,
            peer_port: peer.port(),
            host_port: 0,
            peer_family,
            host_family: None,
        }
    }

    fn peer(&self) -> SocketAddr {
        let ip = unpacked(self.peer_family, self.peer);
        self.with_scope(ip, self.peer_port, self.peer_flow)
    }

    fn host(&self) -> Option<SocketAddr> {
        let ip = unpacked(self.host_family?, self.host);
        Some(self.with_scope(ip, self.host_port, 0))
    }

    fn set_host(&mut self, host: SocketAddr) {
        let (family, bytes) = packed(host.ip());
        (self.host_family, self.host) = (Some(family), bytes);
        self.host_port = host.port();
        if let SocketAddr::V6(host) = host {
            self.scope = self.scope.max(host.scope_id());
        }
    }

    fn with_scope(&self, ip: IpAddr, port: u16, flow: u32) -> SocketAddr {
        match ip {
            IpAddr::V4(_) => SocketAddr::new(ip, port),
            IpAddr::V6(ip) => {
                let scope = if ip.is_unicast_link_local() {
                    self.scope
                } else {
                    0
                };
                SocketAddrV6::new(ip, port, flow, scope).into()
            }
        }
    }
}

fn packed(ip: IpAddr) -> (Family, [u8; 16]) {
    match ip {
        IpAddr::V4(ip) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&ip.octets());
            (Family::V4, bytes)
        }
        IpAddr::V6(ip) => (Family::V6, ip.octets()),
    }
}

fn unpacked(family: Family, bytes: [u8; 16]) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        Family::V6 => Ipv6Addr::from(bytes).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel tells them, for a connection of each sort.
    #[test]
    fn both_ends_come_out_as_they_went_in() {
        let link_local = "fe80::1:2".parse().unwrap();
        let near = |port, scope| SocketAddr::from(SocketAddrV6::new(link_local, port, 0, scope));
        let global: SocketAddr = "[2001:db8::7]:443".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:9".parse().unwrap();
        let flowing = SocketAddrV6::new("2001:db8::8".parse().unwrap(), 1, 0xa_bcde, 0).into();
        let v4: SocketAddr = "192.0.2.200:65535".parse().unwrap();
        let nowhere = SocketAddr::from(([0; 4], 0));
        let ends = [
            (v4, Some("127.0.0.1:1".parse().unwrap())),
            (v4, None),
            (global, Some("[::1]:2".parse().unwrap())),
            (mapped, Some(mapped)),
            (flowing, Some(global)),
            (near(5, 3), Some(near(6, 3))),
            (near(5, 3), Some(global)),
            // A peer that was gone when it was asked for.
            (nowhere, Some(near(7, 4))),
            (nowhere, Some(mapped)),
            (mapped, Some(global)),
        ];
        for (peer, host) in ends {
            let at_once = Ends::new(peer, host);
            assert_eq!((at_once.peer(), at_once.host()), (peer, host));
            let mut later = Ends::new(peer, None);
            assert_eq!((later.peer(), later.host()), (peer, None));
            if let Some(host) = host {
                later.set_host(host);
            }
            assert_eq!((later.peer(), later.host()), (peer, host));
        }
    }

    /// Of both ends of IPv4 nothing is boxed, however it is written.
    #[test]
    fn both_ends_take_sixteen_bytes() {
        assert_eq!(size_of::<Ends>(), 16);
        for text in ["192.0.2.1:9", "[::ffff:192.0.2.1]:9"] {
            let end = text.parse().unwrap();
            assert!(matches!(Ends::new(end, Some(end)), Ends::Short(_)));
        }
    }
}
