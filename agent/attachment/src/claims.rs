//! Claims on ports of a network namespace, among all Pillion processes.
//!
//! Owns the claims: abstract Unix sockets named after the port, which are per network namespace, exclusive, and gone with
//! the process that holds them. So two `pillion run` in the host's namespace never choose the same port, although
//! their companions bind later; and of two workloads with an inbound rule for one port the second is told so, where
//! the kernel would steer everything to the one that came last.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use pillion_workload::{RedirectSpec, WorkloadId};

use crate::ports::Resolved;

/// Bytes of an abstract name.
const LONGEST_NAME: usize = 107;

/// Ports that this process has claimed. Dropping it gives them up.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// For companions to listen on.
    companions: BTreeMap<u16, OwnedFd>,
    /// With inbound rules: the claim, and what tells whose it is.
    inbound: BTreeMap<u16, (OwnedFd, Option<OwnedFd>)>,
}

/// Somebody else has the port, perhaps this workload.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken(pub(crate) Option<String>);

impl Claims {
    /// Claims a port for a companion, if it suits; tells whether that was possible.
    pub(crate) fn claim(&mut self, port: u16, suits: impl Fn(u16) -> bool) -> bool {
        let claim = hold(&companion_port(port)).filter(|_| suits(port));
        claim.is_some_and(|claim| self.companions.insert(port, claim).is_none())
    }

    /// Claims the port of an inbound rule.
    pub(crate) fn claim_inbound(&mut self, port: u16, owner: &WorkloadId) -> Result<(), Taken> {
        let Some(claim) = hold(&format!("pillion/inbound-port/{port}")) else {
            return Err(Taken(whose(port)));
        };
        let mut name = owner_prefix(port) + owner.as_str();
        while name.len() > LONGEST_NAME {
            name.pop();
        }
        self.inbound.insert(port, (claim, hold(&name)));
        Ok(())
    }

    /// Gives up the ports that `resolved` does not have any more.
    pub(crate) fn keep_only(&mut self, resolved: &Resolved) {
        self.companions.retain(|port, _| resolved.allocated.contains(port));
        let inbound = inbound_ports(&resolved.redirect);
        self.inbound.retain(|port, _| inbound.contains(port));
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.companions.extend(other.companions);
        self.inbound.extend(other.inbound);
    }
}

/// The ports that a redirection has inbound rules for.
pub(crate) fn inbound_ports(redirect: &RedirectSpec) -> BTreeSet<u16> {
    redirect.inbound.iter().flat_map(|rule| rule.ports.iter().copied()).collect()
}

fn companion_port(port: u16) -> String {
    format!("pillion/companion-port/{port}")
}

fn owner_prefix(port: u16) -> String {
    format!("pillion/inbound-owner/{port}/")
}

/// Which workload has an inbound rule for the port, by the names of sockets in the calling thread's namespace (proc(5)).
fn whose(port: u16) -> Option<String> {
    let sockets = fs::read_to_string("/proc/thread-self/net/unix").ok()?;
    let prefix = format!("@{}", owner_prefix(port));
    sockets.lines().find_map(|line| Some(line.split_whitespace().last()?.strip_prefix(&prefix)?.to_owned()))
}

fn hold(name: &str) -> Option<OwnedFd> {
    let address = UnixAddr::new_abstract(name.as_bytes()).ok()?;
    let claim = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    bind(claim.as_raw_fd(), &address).ok()?;
    Some(claim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_claimed_once() {
        let (mut first, mut second) = (Claims::default(), Claims::default());
        assert!(first.claim(64999, |_| true));
        assert!(!second.claim(64999, |_| true));
        drop(first);
        assert!(!second.claim(64999, |_| false), "it does not suit");
        assert!(second.claim(64999, |_| true));
    }

    #[test]
    fn a_second_inbound_rule_is_told_whose_the_first_is() {
        let (mut first, mut second) = (Claims::default(), Claims::default());
        let owner: WorkloadId = "containerd/k8s.io/abc".parse().unwrap();
        first.claim_inbound(64998, &owner).unwrap();
        let taken = second.claim_inbound(64998, &"process/b".parse().unwrap());
        assert_eq!(taken, Err(Taken(Some("containerd/k8s.io/abc".to_owned()))));
        first.keep_only(&Resolved::default());
        second.claim_inbound(64998, &owner).unwrap();
        // A name that is cut still tells.
        let long: WorkloadId = format!("process/{}", "x".repeat(200)).parse().unwrap();
        first.claim_inbound(64997, &long).unwrap();
        let Err(Taken(Some(name))) = second.claim_inbound(64997, &owner) else { panic!("it is taken") };
        assert!(long.as_str().starts_with(&name) && name.len() > 60, "{name}");
    }
}
