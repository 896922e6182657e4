//! Flow control (virtio 1.2, section 5.10.6.3).

use super::*;

#[test]
fn s5_10_6_3_the_device_keeps_to_the_guests_credit() {
    let mut setup = Setup::new();
    setup.allocation = 1000;
    let mut host = setup.connected(1);
    host.write_all(&pattern(2500)).unwrap();
    setup.guest.run();
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1.len(), 1000);
    setup.expect(80, 1, Op::CreditRequest);
    setup.expect_nothing();
    // Being told that there is none is no reason to ask again.
    setup.send(80, 1, Op::CreditUpdate, 0, &[]);
    setup.expect_nothing();
    setup.forwarded = 700;
    setup.send(80, 1, Op::CreditUpdate, 0, &[]);
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1.len(), 700);
    setup.expect(80, 1, Op::CreditRequest);
    setup.allocation = 5000;
    setup.send(80, 1, Op::CreditUpdate, 0, &[]);
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1, &pattern(2500)[1700..]);
}

#[test]
fn s5_10_6_3_a_guest_whose_counts_make_no_sense_gets_nothing() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    setup.forwarded = 12_345;
    setup.send(80, 1, Op::CreditUpdate, 0, &[]);
    host.write_all(b"x").unwrap();
    setup.guest.run();
    setup.expect(80, 1, Op::CreditRequest);
    setup.expect_nothing();
}

#[test]
fn s5_10_6_3_the_guest_is_told_of_room_before_it_runs_out() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    let chunk = pattern(32 << 10);
    let mut forwarded = 0;
    for n in 1..=64u32 {
        setup.send(80, 1, Op::ReadWrite, 0, &chunk);
        assert_eq!(read_all(&mut host).len(), chunk.len());
        while let Some((header, _)) = setup.receive() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            forwarded = header.forward_count;
        }
        assert!(n * (32 << 10) - forwarded <= ALLOCATION / 2, "the guest's credit runs low");
    }
}

#[test]
fn s5_10_6_3_a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    // The host reads nothing, so all but what the socket holds must be kept.
    let mut reset = false;
    for _ in 0..40 {
        setup.send(80, 1, Op::ReadWrite, 0, &pattern(60_000));
        while let Some((header, _)) = setup.receive() {
            reset |= header.op == Some(Op::Reset);
        }
    }
    assert!(reset);
    assert!(read_all(&mut host).len() <= 2 << 20);
}

#[test]
fn a_credit_request_is_answered() {
    let mut setup = Setup::new();
    let _host = setup.connected(1);
    setup.send(80, 1, Op::ReadWrite, 0, b"abc");
    setup.send(80, 1, Op::CreditRequest, 0, &[]);
    assert_eq!(setup.expect(80, 1, Op::CreditUpdate).0.forward_count, 3);
}
