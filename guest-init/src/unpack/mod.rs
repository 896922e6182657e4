//! `guest-unpack`: applies an image's layers, in order, to an empty filesystem.
