//! Choices from a seed.

/// A small generator of choices. The same seed makes the same choices, on every platform
/// and in every release of this major version. Not for secrets.
///
/// # Examples
///
/// ```
/// use bowline::testing::Random;
///
/// let mut one = Random::new(7);
/// let mut other = Random::new(7);
/// assert_eq!(one.below(1000), other.below(1000));
/// ```
///
/// Feature `testing`.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Makes a generator that starts from `seed`. Neighbouring seeds have nothing in
    /// common.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Any number at all (the step of splitmix64).
    pub fn any(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `bound`; zero if that is zero.
    pub fn below(&mut self, bound: usize) -> usize {
        // The high half of a product: no division, and no bias that a test
        // could ever notice.
        ((u128::from(self.any()) * bound as u128) >> 64) as usize
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u8) -> bool {
        self.below(100) < usize::from(percent)
    }
}
