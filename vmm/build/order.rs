//! In which order the linker lays functions down, if the build's caller names a file with their names: those that a start runs lie together
//! then, and fewer parts of the program are read and mapped before it is under way (benches/order). `flyrun` is built with it too.

/// The file, with a name on each line.
const ORDER: &str = "FLYRUN_START_ORDER";

/// Tells cargo.
pub fn tell() {
    println!("cargo::rerun-if-env-changed={ORDER}");
    if let Ok(file) = std::env::var(ORDER) {
        println!("cargo::rerun-if-changed={file}");
        println!("cargo::rustc-link-arg-bins=-Wl,--symbol-ordering-file={file},--no-warn-symbol-ordering");
    }
}
