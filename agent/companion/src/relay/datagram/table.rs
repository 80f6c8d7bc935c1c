//! The open flows, found by their source and by the number that epoll hands back, and in the order of their last use. Never
//! touches a socket, never reads a clock.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::super::slab::{Slab, Token};

/// How long a flow may be quiet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It may go on at any time.
    Open = 0,
    /// What was asked has been answered.
    Answered = 1,
}

/// For each [`Patience`]: a flow that was quiet for so long has expired.
pub(super) type Limits = [Duration; 2];

struct Entry<T> {
    flow: T,
    source: SocketAddr,
    last: Instant,
    patience: Patience,
}

/// Flows by source and by last use.
pub(super) struct Table<T> {
    entries: Slab<Entry<T>>,
    by_source: HashMap<SocketAddr, Token>,
    /// By [`Patience`]: the one that was quiet for longest comes first.
    quiet: [BTreeSet<(Instant, Token)>; 2],
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { entries: Slab::default(), by_source: HashMap::new(), quiet: Default::default() }
    }
}

impl<T> Table<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn find(&self, source: SocketAddr) -> Option<Token> {
        self.by_source.get(&source).copied()
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut T> {
        self.entries.get(token).map(|entry| &mut entry.flow)
    }

    /// The token that the next [`Table::insert`] uses.
    pub(super) fn next(&self) -> Token {
        self.entries.next()
    }

    /// `source` must have no flow.
    pub(super) fn insert(&mut self, source: SocketAddr, flow: T, now: Instant) -> Token {
        let patience = Patience::Open;
        let token = self.entries.insert(Entry { flow, source, last: now, patience });
        let before = self.by_source.insert(source, token);
        debug_assert!(before.is_none(), "two flows of one source");
        self.quiet[patience as usize].insert((now, token));
        token
    }

    /// The flow has just been used.
    pub(super) fn touch(&mut self, token: Token, patience: Patience, now: Instant) {
        let Some(entry) = self.entries.get(token) else { return };
        self.quiet[entry.patience as usize].remove(&(entry.last, token));
        (entry.last, entry.patience) = (now, patience);
        self.quiet[patience as usize].insert((now, token));
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        let entry = self.entries.remove(token)?;
        self.by_source.remove(&entry.source);
        self.quiet[entry.patience as usize].remove(&(entry.last, token));
        Some(entry.flow)
    }

    /// The flow that was quiet for longest.
    pub(super) fn quietest(&self) -> Option<Token> {
        self.quiet.iter().filter_map(BTreeSet::first).min().map(|(_, token)| *token)
    }

    /// A flow that has expired.
    pub(super) fn expired(&self, limits: Limits, now: Instant) -> Option<Token> {
        let firsts = self.quiet.iter().zip(limits).filter_map(|(quiet, limit)| Some((quiet.first()?, limit)));
        firsts.filter(|((last, _), limit)| *last + *limit <= now).map(|((_, token), _)| *token).next()
    }

    /// When the next flow expires.
    pub(super) fn next_expiry(&self, limits: Limits) -> Option<Instant> {
        let expiry = |(quiet, limit): (&BTreeSet<(Instant, Token)>, Duration)| Some(quiet.first()?.0 + limit);
        self.quiet.iter().zip(limits).filter_map(expiry).min()
    }

    /// The tokens of all open flows.
    pub(super) fn tokens(&self) -> Vec<Token> {
        self.by_source.values().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = [Duration::from_secs(60), Duration::from_secs(10)];

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16),
        Answered(u16),
        Used(u16),
        Remove(u16),
        Evict,
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let source = 1..12_u16;
        prop_oneof![
            source.clone().prop_map(Step::Insert),
            source.clone().prop_map(Step::Answered),
            source.clone().prop_map(Step::Used),
            source.prop_map(Step::Remove),
            Just(Step::Evict),
            (0..30_u64).prop_map(Step::Wait),
        ]
    }

    /// What the table is to do, said plainly: source, last use, patience.
    type Model = Vec<(u16, Instant, Patience)>;

    fn limit(patience: Patience) -> Duration {
        LIMITS[patience as usize]
    }

    proptest! {
        #[test]
        fn it_does_what_a_list_would(steps in prop::collection::vec(step(), 1..200)) {
            let address = |source: u16| SocketAddr::from(([127, 64, 0, 1], source));
            let (mut table, mut model) = (Table::<u16>::default(), Model::new());
            let mut now = Instant::now();
            for step in steps {
                match step {
                    Step::Insert(source) => {
                        let known = table.find(address(source)).is_some();
                        prop_assert_eq!(known, model.iter().any(|flow| flow.0 == source));
                        if !known {
                            let next = table.next();
                            prop_assert_eq!(table.insert(address(source), source, now), next);
                            model.push((source, now, Patience::Open));
                        }
                    }
                    Step::Answered(source) | Step::Used(source) => {
                        let answered = matches!(step, Step::Answered(_));
                        let patience = if answered { Patience::Answered } else { Patience::Open };
                        if let Some(token) = table.find(address(source)) {
                            table.touch(token, patience, now);
                        }
                        for flow in model.iter_mut().filter(|flow| flow.0 == source) {
                            (flow.1, flow.2) = (now, patience);
                        }
                    }
                    Step::Remove(source) => {
                        let removed = table.find(address(source)).and_then(|token| table.remove(token));
                        prop_assert_eq!(removed, model.iter().any(|f| f.0 == source).then_some(source));
                        model.retain(|flow| flow.0 != source);
                    }
                    Step::Evict => {
                        let evicted = table.quietest().and_then(|token| table.remove(token));
                        let oldest = model.iter().map(|flow| flow.1).min();
                        let found = model.iter().find(|flow| Some(flow.0) == evicted).map(|flow| flow.1);
                        prop_assert_eq!(found, oldest);
                        model.retain(|flow| Some(flow.0) != evicted);
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                }
                prop_assert_eq!(
                    table.next_expiry(LIMITS),
                    model.iter().map(|flow| flow.1 + limit(flow.2)).min()
                );
                while let Some(token) = table.expired(LIMITS, now) {
                    let source = table.remove(token).expect("an expired flow is there");
                    let flow = model.iter().position(|flow| flow.0 == source).expect("known");
                    let (_, last, patience) = model.remove(flow);
                    prop_assert!(last + limit(patience) <= now);
                    prop_assert!(table.get(token).is_none(), "a token is never another's");
                }
                prop_assert!(model.iter().all(|flow| flow.1 + limit(flow.2) > now));
                prop_assert_eq!((table.len(), table.tokens().len()), (model.len(), model.len()));
                for flow in &model {
                    let token = table.find(address(flow.0)).expect("known");
                    prop_assert_eq!(table.get(token).copied(), Some(flow.0));
                }
            }
        }
    }
}
