//! eBPF programs of somebody else, as they are on real nodes: a load balancer for sockets as Cilium's, one that steers arriving
//! connections, one that answers socket options. A few instructions each, assembled here; see `enum bpf_attach_type` and the
//! contexts in linux/bpf.h for the numbers.

mod bpf;

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Where a program runs in a socket's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's names")]
pub enum At {
    Connect4,
    Connect6,
    Getpeername4,
    Getpeername6,
    Getsockopt,
    SkLookup,
}

/// How it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// By a link: others may be attached as well.
    Link,
    /// So that a program below takes its place (`BPF_F_ALLOW_OVERRIDE`).
    Override,
    /// So that nothing may be attached below.
    Alone,
}

/// A program that is attached. Dropping it detaches.
#[derive(Debug)]
pub struct Foreign {
    at: At,
    program: OwnedFd,
    target: File,
    link: Option<OwnedFd>,
    pin: Option<PathBuf>,
    _map: Option<OwnedFd>,
}

impl At {
    /// Program type, attach type.
    fn numbers(self) -> (u32, u32) {
        match self {
            Self::Connect4 => (18, 10),
            Self::Connect6 => (18, 11),
            Self::Getpeername4 => (18, 29),
            Self::Getpeername6 => (18, 30),
            Self::Getsockopt => (25, 21),
            Self::SkLookup => (30, 36),
        }
    }
}

/// One instruction: code, destination and source register, offset, immediate.
fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let mut bytes = [0; 8];
    bytes[0] = code;
    bytes[1] = from << 4 | to;
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// `r0 = 1; exit`.
fn pass() -> [u64; 2] {
    [op(0xb7, 0, 0, 0, 1), op(0x95, 0, 0, 0, 0)]
}

/// The members of `struct bpf_sock_addr` that make a destination, and their values for `address`.
fn members(address: SocketAddr) -> Vec<(i16, i32)> {
    let word = |bytes: &[u8]| i32::from_ne_bytes(bytes.try_into().expect("four bytes"));
    let mut members = match address.ip() {
        IpAddr::V4(ip) => vec![(4, word(&ip.octets()))],
        IpAddr::V6(ip) => {
            ip.octets().chunks(4).zip([8, 12, 16, 20]).map(|(part, at)| (at, word(part))).collect()
        }
    };
    members.push((24, i32::from(address.port().to_be())));
    members
}

/// For one that replaces the address `from` by `to`.
fn translate(from: SocketAddr, to: SocketAddr) -> Vec<u64> {
    let (from, to) = (members(from), members(to));
    let mut program = Vec::new();
    for (index, (member, value)) in from.iter().enumerate() {
        // Over the rest of the comparisons and all of the writing.
        let over = 2 * (from.len() - index - 1) + 2 * to.len();
        // w2 = *(u32 *)(r1 + member); if w2 != value goto over
        program.push(op(0x61, 2, 1, *member, 0));
        program.push(op(0x56, 2, 0, i16::try_from(over).expect("few"), *value));
    }
    for (member, value) in to {
        // w2 = value; *(u32 *)(r1 + member) = w2
        program.push(op(0xb4, 2, 0, 0, value));
        program.push(op(0x63, 1, 2, member, 0));
    }
    program.extend(pass());
    program
}

impl Foreign {
    /// Attaches one that does nothing.
    pub fn idle(name: &str, at: At, target: &Path, by: By) -> Result<Self> {
        Self::attach(name, at, target, by, &pass(), None)
    }

    /// The programs of a load balancer for sockets: who connects to `service` gets to `backend`, and getpeername says `service`.
    pub fn balancer(cgroup: &Path, service: SocketAddr, backend: SocketAddr) -> Result<[Self; 2]> {
        let (connect, name) = if service.is_ipv4() {
            (At::Connect4, At::Getpeername4)
        } else {
            (At::Connect6, At::Getpeername6)
        };
        Ok([
            Self::attach("lb_connect", connect, cgroup, By::Link, &translate(service, backend), None)?,
            Self::attach("lb_name", name, cgroup, By::Link, &translate(backend, service), None)?,
        ])
    }

    /// The `connect` program of [`Foreign::balancer`], attached in a way of one's choice.
    pub fn translator(cgroup: &Path, by: By, service: SocketAddr, backend: SocketAddr) -> Result<Self> {
        let at = if service.is_ipv4() { At::Connect4 } else { At::Connect6 };
        Self::attach("lb_connect", at, cgroup, by, &translate(service, backend), None)
    }

    /// One that gives connections on `port` that do not come from the address `own` to `listener`, with or without `BPF_SK_LOOKUP_F_REPLACE`.
    pub fn steering(
        netns: &Path,
        own: [u8; 4],
        port: u16,
        listener: &TcpListener,
        replace: bool,
    ) -> Result<Self> {
        let map = bpf::map_of(listener).context("a map of a socket")?;
        let mut program = vec![
            op(0xbf, 6, 1, 0, 0),
            // w2 = local_port; if w2 != port goto the end
            op(0x61, 2, 1, 60, 0),
            op(0x56, 2, 0, 16, i32::from(port)),
            // w2 = remote_ip4; if w2 == own goto the end
            op(0x61, 2, 1, 16, 0),
            op(0x16, 2, 0, 14, i32::from_ne_bytes(own)),
            // *(u32 *)(r10 - 4) = 0; r0 = bpf_map_lookup_elem(map, r10 - 4); if r0 == 0 goto the end
            op(0x62, 10, 0, -4, 0),
            op(0x18, 1, 1, 0, map.as_raw_fd()),
            op(0, 0, 0, 0, 0),
            op(0xbf, 2, 10, 0, 0),
            op(0x07, 2, 0, 0, -4),
            op(0x85, 0, 0, 0, 1),
            op(0x15, 0, 0, 7, 0),
            // bpf_sk_assign(context, socket, flags); bpf_sk_release(socket)
            op(0xbf, 7, 0, 0, 0),
            op(0xbf, 1, 6, 0, 0),
            op(0xbf, 2, 0, 0, 0),
            op(0xb7, 3, 0, 0, i32::from(replace)),
            op(0x85, 0, 0, 0, 124),
            op(0xbf, 1, 7, 0, 0),
            op(0x85, 0, 0, 0, 86),
        ];
        program.extend(pass());
        Self::attach("other_steer", At::SkLookup, netns, By::Link, &program, Some(map))
    }

    /// One that puts `address` into every answer to `SO_ORIGINAL_DST`.
    pub fn answering(cgroup: &Path, address: [u8; 4]) -> Result<Self> {
        let mut program = vec![
            // w2 = optname; if w2 != SO_ORIGINAL_DST goto the end
            op(0x61, 2, 1, 28, 0),
            op(0x56, 2, 0, 7, 80),
            // r2 = optval; r3 = optval_end; if r2 + 16 > r3 goto the end; *(u32 *)(r2 + 4) = address
            op(0x79, 2, 1, 8, 0),
            op(0x79, 3, 1, 16, 0),
            op(0xbf, 4, 2, 0, 0),
            op(0x07, 4, 0, 0, 16),
            op(0x2d, 4, 3, 2, 0),
            op(0xb4, 4, 0, 0, i32::from_ne_bytes(address)),
            op(0x63, 2, 4, 4, 0),
        ];
        program.extend(pass());
        Self::attach("other_answer", At::Getsockopt, cgroup, By::Link, &program, None)
    }

    fn attach(
        name: &str,
        at: At,
        target: &Path,
        by: By,
        program: &[u64],
        map: Option<OwnedFd>,
    ) -> Result<Self> {
        let (kind, attach_type) = at.numbers();
        let loaded =
            bpf::load(name, kind, attach_type, program).with_context(|| format!("cannot load {name}"))?;
        let target = File::open(target).with_context(|| format!("cannot open {}", target.display()))?;
        let flags = match by {
            By::Link => None,
            By::Override => Some(1),
            By::Alone => Some(0),
        };
        let link = match flags {
            None => Some(bpf::link(loaded.as_fd(), target.as_fd(), attach_type)),
            Some(flags) => {
                bpf::attach(loaded.as_fd(), target.as_fd(), attach_type, flags)
                    .with_context(|| format!("cannot attach {name}"))?;
                None
            }
        };
        let link = link.transpose().with_context(|| format!("cannot attach {name}"))?;
        Ok(Self { at, program: loaded, target, link, pin: None, _map: map })
    }

    /// Pins the link, or the program where there is none.
    pub fn pin(&mut self, path: &Path) -> Result<()> {
        bpf::pin(self.link.as_ref().unwrap_or(&self.program).as_fd(), path)
            .with_context(|| format!("cannot pin at {}", path.display()))?;
        self.pin = Some(path.to_owned());
        Ok(())
    }

    /// The kernel's id of the program.
    pub fn id(&self) -> Result<u32> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.program.as_raw_fd()))?;
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")).context("a program's id")?;
        Ok(id.trim().parse()?)
    }

    /// Whether it is still attached.
    pub fn is_attached(&self) -> Result<bool> {
        Ok(bpf::attached(self.target.as_fd(), self.at.numbers().1)?.contains(&self.id()?))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(pin) = &self.pin {
            let _ = fs::remove_file(pin);
        }
        if self.link.is_none() {
            let _ = bpf::detach(self.program.as_fd(), self.target.as_fd(), self.at.numbers().1);
        }
    }
}
