//! A set of ports as ranges.

use std::{fmt, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

/// Ports, 0 to 65535, as ascending ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Item>", into = "Vec<Item>")]
pub struct PortSet(Vec<(u16, u16)>);

impl PortSet {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `port` is one of them.
    pub fn contains(&self, port: u16) -> bool {
        let at = self.0.partition_point(|(_, last)| *last < port);
        self.0.get(at).is_some_and(|(first, _)| *first <= port)
    }

    /// Adds all ports from the first to the last; nothing where the first is higher.
    pub fn insert(&mut self, range: RangeInclusive<u16>) {
        let (mut first, mut last) = range.into_inner();
        if first > last {
            return;
        }
        let from = self.0.partition_point(|(_, end)| end.checked_add(1).is_some_and(|next| next < first));
        let to = self.0.partition_point(|(start, _)| *start <= last.saturating_add(1));
        if let Some(touched) = self.0.get(from..to)
            && let (Some(lowest), Some(highest)) = (touched.first(), touched.last())
        {
            first = first.min(lowest.0);
            last = last.max(highest.1);
        }
        self.0.splice(from..to.max(from), [(first, last)]);
    }

    /// All ports of some ranges.
    pub fn from_ranges(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Self {
        let mut set = Self::default();
        for range in ranges {
            set.insert(range);
        }
        set
    }

    /// Those that are in the other set too.
    #[must_use]
    pub fn within(&self, other: &Self) -> Self {
        let mut both = Vec::new();
        let (mut left, mut right) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
            let (first, last) = (a.0.max(b.0), a.1.min(b.1));
            if first <= last {
                both.push((first, last));
            }
            if a.1 <= b.1 {
                left.next()
            } else {
                right.next()
            };
        }
        Self(both)
    }

    /// Those that are not in the other set.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        let mut next = Some(0);
        for (first, last) in &other.0 {
            if let (Some(from), Some(to)) = (next, first.checked_sub(1))
                && from <= to
            {
                rest.0.push((from, to));
            }
            next = last.checked_add(1);
        }
        rest.0.extend(next.map(|from| (from, u16::MAX)));
        self.within(&rest)
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = RangeInclusive<u16>> {
        self.0.iter().map(|(first, last)| *first..=*last)
    }
}

impl FromIterator<RangeInclusive<u16>> for PortSet {
    fn from_iter<I: IntoIterator<Item = RangeInclusive<u16>>>(ranges: I) -> Self {
        Self::from_ranges(ranges)
    }
}

impl FromIterator<u16> for PortSet {
    fn from_iter<I: IntoIterator<Item = u16>>(ports: I) -> Self {
        let mut set = Self::default();
        for port in ports {
            set.insert(port..=port);
        }
        set
    }
}

impl<const N: usize> From<[u16; N]> for PortSet {
    fn from(ports: [u16; N]) -> Self {
        ports.into_iter().collect()
    }
}

/// `22, 8000-8999`.
impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

/// A port, or the first and the last of a range.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Item {
    One(u16),
    Range(u16, u16),
}

impl From<Vec<Item>> for PortSet {
    fn from(items: Vec<Item>) -> Self {
        let mut set = Self::default();
        for item in items {
            let (Item::One(first) | Item::Range(first, _)) = item;
            let (Item::One(last) | Item::Range(_, last)) = item;
            set.insert(first..=last);
        }
        set
    }
}

impl From<PortSet> for Vec<Item> {
    fn from(set: PortSet) -> Self {
        let item = |(first, last)| if first == last { Item::One(first) } else { Item::Range(first, last) };
        set.0.into_iter().map(item).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_join() {
        for (ranges, expected) in [
            (&[(80, 80)][..], "80"),
            (&[(80, 80), (81, 81)], "80-81"),
            (&[(81, 81), (80, 80)], "80-81"),
            (&[(1, 5), (10, 20), (4, 12)], "1-20"),
            (&[(1, 5), (7, 9)], "1-5, 7-9"),
            (&[(0, 65535), (3, 4)], "0-65535"),
            (&[(65535, 65535), (0, 0)], "0, 65535"),
            (&[(5, 4)], ""),
        ] {
            let mut set = PortSet::default();
            for (first, last) in ranges {
                set.insert(*first..=*last);
            }
            assert_eq!(set.to_string(), expected, "{ranges:?}");
        }
    }

    proptest! {
        #[test]
        fn two_sets_meet(
            one in proptest::collection::vec((0..300_u16, 0..40_u16), 0..10),
            two in proptest::collection::vec((0..300_u16, 0..40_u16), 0..10),
        ) {
            let set = |ranges: &[(u16, u16)]| -> PortSet { ranges.iter().map(|(first, more)| *first..=first + more).collect() };
            let (one, two) = (set(&one), set(&two));
            for port in (0..400).chain(65530..=65535) {
                prop_assert_eq!(one.within(&two).contains(port), one.contains(port) && two.contains(port));
                prop_assert_eq!(one.without(&two).contains(port), one.contains(port) && !two.contains(port));
            }
        }

        #[test]
        fn it_has_what_was_put_in(ranges in proptest::collection::vec((0..300_u16, 0..40_u16), 0..20)) {
            let mut set = PortSet::default();
            for (first, more) in &ranges {
                set.insert(*first..=first + more);
            }
            for port in 0..400 {
                let expected = ranges.iter().any(|(first, more)| (*first..=first + more).contains(&port));
                prop_assert_eq!(set.contains(port), expected, "{} in {}", port, set);
            }
            let gaps = set.0.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0);
            prop_assert!(gaps, "{}", set);
            let text = serde_json::to_string(&set).unwrap();
            prop_assert_eq!(serde_json::from_str::<PortSet>(&text).unwrap(), set);
        }
    }
}
