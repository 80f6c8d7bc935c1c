//! Names of units: what they may hold, the object paths and cgroups that follow from them, and which drop-in directories
//! cover a pattern of names.
//!
//! Pure. Only services are workloads: scopes are made by whoever runs what is in them (a login, a container engine), which
//! is a source of its own, and the other types run nothing for long.

use std::{
    fmt::{self, Write as _},
    path::Path,
};

use pillion_workload::WorkloadId;

const SUFFIX: &str = ".service";
/// What ids of units begin with.
const PREFIX: &str = "systemd/";
/// A workload id has at most 253 bytes; systemd allows 255 for the unit's name alone.
const LONGEST: usize = 244;
/// Where systemd's bus API has units.
const OBJECTS: &str = "/org/freedesktop/systemd1/unit/";
/// Services that Pillion, or systemd itself, needs while a unit is held: holding one of them would make it wait for itself.
const NEVER_HELD: [&str; 4] = ["dbus", "systemd", "init", "pillion"];

/// The name of a service unit, such as `payments@1.service`; kept as the id of its workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitName(WorkloadId);

/// Not the name of a service unit that can be a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the name of a service: letters, digits and :-_.\\@ and the suffix .service, \
     at most {LONGEST} bytes"
)]
pub struct InvalidUnitName(String);

impl TryFrom<&str> for UnitName {
    type Error = InvalidUnitName;

    fn try_from(name: &str) -> Result<Self, InvalidUnitName> {
        let valid = name.len() <= LONGEST
            && name.strip_suffix(SUFFIX).is_some_and(|stem| !stem.is_empty() && !stem.starts_with('@'))
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b));
        let id = valid.then(|| WorkloadId::try_from(format!("{PREFIX}{name}")).ok()).flatten();
        id.map(Self).ok_or_else(|| InvalidUnitName(name.chars().take(80).collect()))
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl UnitName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str().strip_prefix(PREFIX).unwrap_or_default()
    }

    /// Its workload's id.
    pub fn id(&self) -> WorkloadId {
        self.0.clone()
    }

    /// The unit behind an id of this source; `None` for other ids.
    pub(super) fn of(id: &WorkloadId) -> Option<Self> {
        Self::try_from(id.as_str().strip_prefix(PREFIX)?).ok()
    }

    /// Whether it is a template, which is not a unit itself.
    pub(super) fn is_template(&self) -> bool {
        self.as_str().ends_with("@.service")
    }

    /// Whether units of this name may be held at their start.
    pub(super) fn may_be_held(&self) -> bool {
        let stem = self.as_str().strip_suffix(SUFFIX).unwrap_or_default();
        let family = stem.split(['-', '@', '.']).next().unwrap_or(stem);
        !NEVER_HELD.contains(&family)
    }

    /// Its object on the bus. Everything but letters and digits is written as `_` and two hexadecimal digits.
    pub(super) fn object(&self) -> String {
        let mut path = OBJECTS.to_owned();
        for (position, byte) in self.as_str().bytes().enumerate() {
            if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && position > 0) {
                path.push(char::from(byte));
            } else {
                let _ = write!(path, "_{byte:02x}");
            }
        }
        path
    }

    /// The unit whose object this is; `None` when it is none, or another type's.
    pub(super) fn of_object(path: &str) -> Option<Self> {
        let mut rest = path.strip_prefix(OBJECTS)?;
        let mut name = Vec::new();
        while let Some(&byte) = rest.as_bytes().first() {
            if byte == b'_' {
                name.push(u8::from_str_radix(rest.get(1..3)?, 16).ok()?);
                rest = rest.get(3..)?;
            } else {
                name.push(byte);
                rest = rest.get(1..)?;
            }
        }
        Self::try_from(std::str::from_utf8(&name).ok()?).ok()
    }

    /// The unit's own part of the path of a cgroup that is the unit's or below it: a command of a unit with `Delegate=`
    /// runs in a cgroup below. systemd puts `_` before a name that would meet a control file, such as `memory.service`.
    pub(super) fn cgroup_in<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        path.ancestors().find(|path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
                name == self.as_str() || name.strip_prefix('_').is_some_and(|name| name == self.as_str())
            })
        })
    }
}

/// How units that do not exist yet, and that a pattern of a policy selects, can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cover {
    /// By a drop-in for this name: a unit's, a template's, or a prefix that ends with a dash (systemd.unit(5)). It may reach
    /// more units than the pattern selects; these ask and are let run.
    Name(String),
    /// The pattern selects no service, or only such as are never held.
    Nothing,
    /// Only by one for all services, which is not made.
    Impossible,
}

/// What covers a pattern of unit names with `*` and `?`.
pub(super) fn cover(pattern: &str) -> Cover {
    let wildcards = ['*', '?'];
    let Some(first) = pattern.find(wildcards) else {
        return match UnitName::try_from(pattern) {
            Ok(unit) if unit.may_be_held() => Cover::Name(unit.to_string()),
            Ok(_) | Err(_) => Cover::Nothing,
        };
    };
    let (literal, rest) = pattern.split_at(first);
    let tail = rest.rsplit(wildcards).next().unwrap_or_default();
    if !SUFFIX.ends_with(tail) && !tail.ends_with(SUFFIX) {
        return Cover::Nothing;
    }
    let cut = literal.rfind('@').or_else(|| literal.rfind('-'));
    // A dash at the very beginning is no prefix to systemd.
    let Some(cut) = cut.filter(|cut| *cut > 0) else {
        let family = literal.split(['-', '@', '.']).next().unwrap_or_default();
        let held_never = family.len() < literal.len() && NEVER_HELD.contains(&family);
        return if held_never { Cover::Nothing } else { Cover::Impossible };
    };
    match UnitName::try_from(format!("{}{SUFFIX}", &literal[..=cut]).as_str()) {
        Ok(unit) if unit.may_be_held() => Cover::Name(unit.to_string()),
        Ok(_) | Err(_) => Cover::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unit(name: &str) -> UnitName {
        UnitName::try_from(name).expect(name)
    }

    #[test]
    fn only_services_are_taken() {
        let long = format!("{}.service", "a".repeat(LONGEST));
        for (name, valid) in [
            ("a.service", true),
            ("payments-api@1:2.service", true),
            (r"dev-disk\x2d1.service", true),
            ("payments@.service", true),
            ("_x.service", true),
            (".service", false),
            ("@.service", false),
            (".x.service", false),
            ("a.scope", false),
            ("a/b.service", false),
            ("a b.service", false),
            ("ä.service", false),
            ("", false),
            (long.as_str(), false),
        ] {
            assert_eq!(UnitName::try_from(name).is_ok(), valid, "{name}");
        }
        assert!(unit("p@.service").is_template() && !unit("p@1.service").is_template());
    }

    #[test]
    fn ids_lead_back_to_units() {
        let unit = unit(r"a@b\x2dc.service");
        assert_eq!(unit.id().as_str(), r"systemd/a@b\x2dc.service");
        assert_eq!(UnitName::of(&unit.id()), Some(unit));
        assert_eq!(UnitName::of(&"process/1-2".parse().expect("valid")), None);
        let longest = format!("{}.service", "a".repeat(LONGEST - SUFFIX.len()));
        assert_eq!(UnitName::try_from(longest.as_str()).expect("valid").id().as_str().len(), 252);
    }

    #[test]
    fn objects_are_escaped_as_systemd_does() {
        for (name, object) in [
            ("dbus.service", "dbus_2eservice"),
            ("1a.service", "_31a_2eservice"),
            (r"a-b@c\x2d.service", "a_2db_40c_5cx2d_2eservice"),
        ] {
            assert_eq!(unit(name).object(), format!("{OBJECTS}{object}"));
        }
        for path in
            ["/", "/org/freedesktop/systemd1/unit/", "/org/freedesktop/systemd1/unit/a_2", "/x/a_2eservice"]
        {
            assert_eq!(UnitName::of_object(path), None, "{path}");
        }
    }

    #[test]
    fn a_command_below_the_unit_belongs_to_it() {
        for (name, path, found) in [
            ("a.service", "/system.slice/a.service", Some("/system.slice/a.service")),
            ("a.service", "/system.slice/a.service/.control", Some("/system.slice/a.service")),
            ("memory.service", "/system.slice/_memory.service", Some("/system.slice/_memory.service")),
            ("a.service", "/system.slice/b.service", None),
            ("a.service", "/", None),
        ] {
            assert_eq!(unit(name).cgroup_in(Path::new(path)), found.map(Path::new), "{path}");
        }
    }

    #[test]
    fn patterns_are_covered_by_prefixes() {
        let name = |name: &str| Cover::Name(name.to_owned());
        for (pattern, wanted) in [
            ("payments.service", name("payments.service")),
            ("payments-*.service", name("payments-.service")),
            ("payments-*", name("payments-.service")),
            ("payments-api*.service", name("payments-.service")),
            ("payments-a?-x.service", name("payments-.service")),
            ("payments-api@*.service", name("payments-api@.service")),
            ("payments-api@a-*.service", name("payments-api@.service")),
            ("payments*.service", Cover::Impossible),
            ("*", Cover::Impossible),
            ("-*.service", Cover::Impossible),
            ("payments-*.socket", Cover::Nothing),
            ("payments.socket", Cover::Nothing),
            ("systemd-*.service", Cover::Nothing),
            ("dbus.service", Cover::Nothing),
        ] {
            assert_eq!(cover(pattern), wanted, "{pattern}");
        }
    }

    #[test]
    fn what_a_hold_needs_is_never_held() {
        for (name, held) in [
            ("dbus.service", false),
            ("dbus-broker.service", false),
            ("systemd-journald.service", false),
            ("pillion.service", false),
            ("pillions.service", true),
            ("user@1000.service", true),
        ] {
            assert_eq!(unit(name).may_be_held(), held, "{name}");
        }
    }

    proptest! {
        #[test]
        fn objects_lead_back_to_units(stem in "[a-zA-Z0-9:_.\\\\@-]{1,40}") {
            if let Ok(unit) = UnitName::try_from(format!("{stem}.service").as_str()) {
                prop_assert_eq!(UnitName::of_object(&unit.object()), Some(unit.clone()));
                prop_assert_eq!(UnitName::of(&unit.id()), Some(unit));
            }
        }

        #[test]
        fn anything_may_come(text: String) {
            let _ = UnitName::of_object(&format!("{OBJECTS}{text}"));
            let _ = UnitName::of_object(&text);
            let _ = UnitName::try_from(text.as_str());
            let _ = cover(&text);
        }
    }
}
