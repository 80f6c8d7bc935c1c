//! `pillion-inventory save FILE` and `pillion-inventory compare FILE`: what is on the machine more than before. For xtask,
//! which compares over all suites.
#![expect(clippy::print_stdout, reason = "a command line program")]

use std::{env, fs, time::Duration};

use anyhow::{Context as _, Result, bail};
use pillion_tests::Inventory;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["save", file] => {
            let found = serde_json::to_string(&Inventory::take()?)?;
            fs::write(file, found).with_context(|| format!("cannot write {file}"))
        }
        ["compare", file] => {
            let before = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
            let before: Inventory = serde_json::from_str(&before).with_context(|| format!("in {file}"))?;
            before.expect_nothing_added(Duration::from_secs(10))
        }
        [] => {
            Inventory::take()?.lines().for_each(|line| println!("{line}"));
            Ok(())
        }
        _ => bail!("usage: pillion-inventory [save FILE | compare FILE]"),
    }
}
