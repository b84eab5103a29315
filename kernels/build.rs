//! The library is loaded by a host that may call it from detached threads until the process ends: it must never be
//! unmapped, whatever `dlclose` is told.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
