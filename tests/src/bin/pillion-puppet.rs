//! The program behind `pillion_tests::Puppet`. Never run by hand.

fn main() -> std::io::Result<()> {
    pillion_tests::puppet::stage::main()
}
