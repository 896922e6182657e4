//! What is answered here: the addresses of the machines of one network (RFC 1035, RFC 3596).

use std::net::{Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::{A, AAAA, RData};
use simple_dns::{CLASS, OPCODE, Packet, PacketFlag, QTYPE, ResourceRecord, TYPE};

/// Seconds; a machine that comes back has another address.
const TTL: u32 = 1;

/// The answer to a question for a machine's name; `None` where somebody else is to be asked.
pub fn own(bytes: &[u8], find: impl Fn(&str) -> Option<(Ipv4Addr, Ipv6Addr)>) -> Option<Vec<u8>> {
    let packet = Packet::parse(bytes).ok()?;
    if packet.has_flags(PacketFlag::RESPONSE) || packet.opcode() != OPCODE::StandardQuery {
        return None;
    }
    let [question] = packet.questions.as_slice() else { return None };
    let name = question.qname.to_string();
    let (ipv4, ipv6) = find(name.trim_end_matches('.'))?;
    let mut reply = Packet::new_reply(packet.id());
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER | PacketFlag::RECURSION_AVAILABLE);
    if packet.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    reply.questions.push(question.clone());
    let mut add =
        |data| reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, data));
    // A name that is there without a record of the type asked for is an answer too, and an empty one.
    if matches!(question.qtype, QTYPE::TYPE(TYPE::A) | QTYPE::ANY) {
        add(RData::A(A { address: ipv4.into() }));
    }
    if matches!(question.qtype, QTYPE::TYPE(TYPE::AAAA) | QTYPE::ANY) {
        add(RData::AAAA(AAAA { address: ipv6.into() }));
    }
    reply.build_bytes_vec().ok()
}

/// The first two bytes of what may be a question.
pub fn id_of_question(bytes: &[u8]) -> Option<[u8; 2]> {
    let [a, b, flags, ..] = bytes else { return None };
    (bytes.len() >= 12 && flags & 0x80 == 0).then_some([*a, *b])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simple_dns::{Name, QCLASS, Question};

    use super::*;

    fn question(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(7);
        let name = Name::new_unchecked(name);
        packet.questions.push(Question::new(name, QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN), false));
        packet.build_bytes_vec().unwrap()
    }

    fn find(name: &str) -> Option<(Ipv4Addr, Ipv6Addr)> {
        (name == "web").then_some((Ipv4Addr::new(10, 0, 0, 1), Ipv6Addr::LOCALHOST))
    }

    #[test]
    fn a_machine_has_an_address_of_each_kind_and_nothing_else() {
        for (kind, answers) in [(TYPE::A, 1), (TYPE::AAAA, 1), (TYPE::MX, 0)] {
            let bytes = own(&question("web", kind), find).unwrap();
            let reply = Packet::parse(&bytes).unwrap();
            assert_eq!((reply.id(), reply.answers.len()), (7, answers));
        }
        assert_eq!(own(&question("web.example", TYPE::A), find), None);
    }

    #[test]
    fn an_answer_is_no_question() {
        let answer = own(&question("web", TYPE::A), find).unwrap();
        assert_eq!(own(&answer, find), None);
        assert_eq!(id_of_question(&answer), None);
        assert_eq!(id_of_question(&question("x", TYPE::A)), Some([0, 7]));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = own(&bytes, |_| Some((Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)));
            let _ = id_of_question(&bytes);
        }

        #[test]
        fn no_damage_makes_it_panic(at in 0usize..40, value: u8) {
            let mut bytes = question("web", TYPE::A);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            let _ = own(&bytes, find);
        }
    }
}
