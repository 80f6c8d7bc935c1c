//! What the tables in the kernel say of one destination, read as the programs read them, for `explain`.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
};

use aya::maps::{Map, MapError};
use ipnet::IpNet;
use pillion_common::{Route, WorkloadConfig, flags};
use pillion_workload::{CgroupId, Protocol};

use crate::{
    Dataplane, RedirectError,
    dataplane::{Maps, NetworkKey, network_key, route_key},
    decision::Rule,
    guard::listener_keys,
    sys,
    tables::Ports,
};

/// What stands in the kernel's maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableAnswer {
    /// Number of the table in force.
    pub table: u32,
    /// The class of the destination; `None` where no table is looked at, since one rule takes all TCP.
    pub class: Option<u32>,
    /// Which rule.
    pub rule: Rule,
    /// The companion's port, unless it passes.
    pub companion_port: Option<u16>,
    /// The companion has a listener for IPv4 there, and one for IPv6.
    pub listens: [bool; 2],
}

impl Dataplane {
    /// Looks a destination up as the programs on this cgroup do. Who sends is not looked at, nor that loopback passes.
    ///
    /// # Errors
    /// [`RedirectError::NotInForce`] where nothing that the workload sends is redirected.
    pub fn look_up(
        &self,
        cgroup: CgroupId,
        protocol: Protocol,
        to: SocketAddr,
    ) -> Result<TableAnswer, RedirectError> {
        let maps = self.maps();
        let config = maps.configuration(cgroup)?;
        if config.flags & flags::OUTBOUND == 0 {
            return Err(RedirectError::NotInForce);
        }
        let (class, route) = if config.flags & flags::ONE_ROUTE != 0 {
            (None, if protocol == Protocol::Tcp { config.route } else { Route::default() })
        } else {
            let class = maps.class(&config, to.ip().to_canonical())?;
            (Some(class), maps.route(config.table, class, protocol, to.port())?)
        };
        if route.flags & Route::REDIRECT == 0 {
            let (rule, companion_port) = (Rule::None, None);
            return Ok(TableAnswer { table: config.table, class, rule, companion_port, listens: [false; 2] });
        }
        let rule = match route.rule {
            Route::DNS_RULE => Rule::Dns,
            index => Rule::Outbound(usize::try_from(index).unwrap_or(usize::MAX)),
        };
        Ok(TableAnswer {
            table: config.table,
            class,
            rule,
            companion_port: Some(route.companion_port),
            listens: maps.listens(config.workload, route.companion_port, protocol),
        })
    }
}

impl Maps {
    fn configuration(&self, cgroup: CgroupId) -> Result<WorkloadConfig, RedirectError> {
        const NAME: &str = "PL_WORKLOADS";
        let (Map::CgroupStorage(data) | Map::Unsupported(data)) = &self.workloads else {
            return Err(RedirectError::Missing(NAME));
        };
        match sys::read_cgroup_storage(data.fd().as_fd(), cgroup.0) {
            Ok(config) => Ok(config),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Err(RedirectError::NotInForce),
            Err(error) => Err(RedirectError::sys("cannot read", Path::new(NAME))(error)),
        }
    }

    fn class(&self, config: &WorkloadConfig, address: IpAddr) -> Result<u32, RedirectError> {
        let class = match network_key(config.table, &IpNet::from(address)) {
            NetworkKey::V4(key) if config.flags & flags::NETWORKS4 != 0 => {
                found(self.networks4.get(&key, 0), "PL_NETS4")?
            }
            NetworkKey::V6(key) if config.flags & flags::NETWORKS6 != 0 => {
                found(self.networks6.get(&key, 0), "PL_NETS6")?
            }
            NetworkKey::V4(_) | NetworkKey::V6(_) => None,
        };
        Ok(class.unwrap_or(0))
    }

    fn route(&self, table: u32, class: u32, protocol: Protocol, port: u16) -> Result<Route, RedirectError> {
        let key = route_key(table, &Ports { class, protocol, port, length: u16::BITS });
        Ok(found(self.routes.get(&key, 0), "PL_ROUTES")?.unwrap_or_default())
    }

    /// A map of sockets tells user space its keys only.
    fn listens(&self, workload: u32, port: u16, protocol: Protocol) -> [bool; 2] {
        let mut listens = [false; 2];
        let wanted = listener_keys(workload, port, protocol);
        for key in self.listeners.keys().flatten() {
            for (listens, wanted) in listens.iter_mut().zip(wanted) {
                *listens |= key == wanted;
            }
        }
        listens
    }
}

fn found<T>(result: Result<T, MapError>, map: &'static str) -> Result<Option<T>, RedirectError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(error) => Err(RedirectError::map(map)(error)),
    }
}
