//! Asks bpf-linker to expand small memory operations in place: a call for a few zeroes costs more than they do.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
}
