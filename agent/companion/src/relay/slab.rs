//! The open connections or flows, found by the number that epoll hands back. A number is never mistaken for its successor in
//! the same place: it carries a generation.

use super::connection::Side;

/// Names one of them for as long as it is open, and never another one after that (2³² reuses of a place aside).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Token {
    place: u32,
    generation: u32,
}

impl Token {
    /// For epoll: generation, place, side.
    pub(super) fn event(self, side: Side) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.place) << 1 | side as u64
    }

    /// The reverse of [`Token::event`].
    pub(super) fn of_event(event: u64) -> (Self, Side) {
        let side = if event & 1 == 0 { Side::Client } else { Side::Upstream };
        let place = u32::try_from((event >> 1) & 0x7fff_ffff).expect("31 bits fit");
        (Self { place, generation: u32::try_from(event >> 32).expect("32 bits fit") }, side)
    }
}

pub(super) struct Slab<T> {
    places: Vec<(u32, Option<Box<T>>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// The token that the next [`Slab::insert`] uses.
    pub(super) fn next(&self) -> Token {
        match self.free.last() {
            Some(&place) => Token { place, generation: self.places[place as usize].0 },
            None => Token {
                place: u32::try_from(self.places.len()).expect("the limits are far below 2^30"),
                generation: 0,
            },
        }
    }

    pub(super) fn insert(&mut self, value: T) -> Token {
        let token = self.next();
        if self.free.pop().is_none() {
            self.places.push((0, None));
        }
        self.places[token.place as usize].1 = Some(Box::new(value));
        token
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut T> {
        let (generation, value) = self.places.get_mut(token.place as usize)?;
        if *generation == token.generation { value.as_deref_mut() } else { None }
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        let (generation, value) = self.places.get_mut(token.place as usize)?;
        if *generation != token.generation {
            return None;
        }
        let value = value.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(token.place);
        Some(*value)
    }

    /// The tokens of all that are open.
    pub(super) fn tokens(&self) -> Vec<Token> {
        let open = self.places.iter().enumerate().filter(|(_, (_, value))| value.is_some());
        open.map(|(place, (generation, _))| Token {
            place: u32::try_from(place).expect("places are counted in 32 bits"),
            generation: *generation,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_way_through_epoll() {
        for (place, generation) in [(0, 0), (1, 7), (0x3fff_ffff, u32::MAX)] {
            let token = Token { place, generation };
            for side in [Side::Client, Side::Upstream] {
                assert_eq!(Token::of_event(token.event(side)), (token, side));
            }
        }
    }
}
