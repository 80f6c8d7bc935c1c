//! The program behind `cargo xtask bench`.

fn main() -> anyhow::Result<()> {
    pillion_tests::bench::main()
}
