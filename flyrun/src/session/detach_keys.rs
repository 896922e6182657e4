//! The keys that leave a terminal's session, docker's: Ctrl-P, then Ctrl-Q. Pure.

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

/// Watches what is typed. A Ctrl-P is held back until the next key says what it meant.
#[derive(Debug, Default)]
pub struct DetachKeys {
    held: bool,
}

/// What came of some typed bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// What is for the process.
    pub bytes: Vec<u8>,
    /// Whether the keys were typed; what follows them is dropped.
    pub detach: bool,
}

impl DetachKeys {
    /// Takes bytes as they are typed.
    pub fn typed(&mut self, input: &[u8]) -> Typed {
        let mut bytes = Vec::with_capacity(input.len() + 1);
        for &byte in input {
            match (self.held, byte) {
                (true, CTRL_Q) => return Typed { bytes, detach: true },
                (true, CTRL_P) => bytes.push(CTRL_P),
                (true, other) => {
                    self.held = false;
                    bytes.extend([CTRL_P, other]);
                }
                (false, CTRL_P) => self.held = true,
                (false, other) => bytes.push(other),
            }
        }
        Typed { bytes, detach: false }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_keys_detach_also_when_they_come_apart() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.typed(b"a\x10"), Typed { bytes: b"a".to_vec(), detach: false });
        assert_eq!(keys.typed(b"\x11b"), Typed { bytes: vec![], detach: true });
    }

    #[test]
    fn a_shell_s_previous_line_still_works() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.typed(b"\x10\x10\r"), Typed { bytes: b"\x10\x10\r".to_vec(), detach: false });
    }

    proptest! {
        #[test]
        fn without_the_keys_nothing_is_lost(
            input in proptest::collection::vec(prop_oneof![Just(CTRL_P), any::<u8>()], 0..40), piece in 1usize..7
        ) {
            prop_assume!(!input.windows(2).any(|two| two == [CTRL_P, CTRL_Q]));
            let mut keys = DetachKeys::default();
            let mut bytes = Vec::new();
            for piece in input.chunks(piece) {
                let typed = keys.typed(piece);
                prop_assert!(!typed.detach);
                bytes.extend(typed.bytes);
            }
            if input.last() == Some(&CTRL_P) {
                bytes.push(CTRL_P);
            }
            prop_assert_eq!(bytes, input);
        }
    }
}
