//! What `../program.rs` does, for kernels that would verify its walk on every path to it, which is more than they are ready to
//! do: programs cannot be told apart, and a policy that excludes some is refused.

/// Never: no rule that would ask is put in force.
#[inline(always)]
pub fn is_left_alone(_table: u32) -> bool {
    false
}
