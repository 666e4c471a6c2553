//! Rules of nf_tables: expressions over 4-byte registers, in the order in which the kernel runs them for a packet.

use super::message::Attributes;

/// `NFT_REG32_00` + n: the n-th of sixteen 4-byte registers.
const REGISTER: u32 = 8;
/// `NFT_REG_VERDICT`.
const VERDICT: u32 = 0;

/// Keys of `meta`.
#[derive(Clone, Copy)]
pub enum Meta {
    /// Name of the interface it came in by.
    InName = 6,
    /// Name of the interface it goes out by.
    OutName = 7,
    /// Layer 3 protocol, `NFPROTO_…`.
    Family = 15,
    /// Layer 4 protocol.
    Protocol = 16,
}

/// Where `payload` reads.
#[derive(Clone, Copy)]
pub enum Base {
    /// Layer 3 header.
    Network = 1,
    /// Layer 4 header.
    Transport = 2,
}

/// A rule being written. Register numbers count 4-byte registers.
#[derive(Default)]
pub struct Rule(Vec<(&'static str, Attributes)>);

impl Rule {
    /// Into the `expressions` attribute of a rule.
    pub fn write(self, into: &mut Attributes) {
        for (name, data) in self.0 {
            into.nested(1, |element| {
                element.name(1, name).nested(2, |inner| *inner = data);
            });
        }
    }

    /// Loads a fact about the packet.
    pub fn meta(self, key: Meta, register: u32) -> Self {
        self.push("meta", |a| {
            a.number(1, REGISTER + register).number(2, key as u32);
        })
    }

    /// Loads bytes of a header.
    pub fn payload(self, base: Base, offset: u32, length: u32, register: u32) -> Self {
        self.push("payload", |a| {
            a.number(1, REGISTER + register).number(2, base as u32).number(3, offset).number(4, length);
        })
    }

    /// Goes on only if the registers from the first on hold `value`.
    pub fn equal(self, value: &[u8]) -> Self {
        self.compare(0, value)
    }

    /// Goes on only if the registers from the first on hold something else.
    pub fn differ(self, value: &[u8]) -> Self {
        self.compare(1, value)
    }

    /// Masks the registers from the first on.
    pub fn mask(self, mask: &[u8]) -> Self {
        self.push("bitwise", |a| {
            a.number(1, REGISTER).number(2, REGISTER).number(3, mask.len() as u32);
            a.nested(4, |d| {
                d.bytes(1, mask);
            });
            a.nested(5, |d| {
                d.bytes(1, &vec![0; mask.len()]);
            });
        })
    }

    /// Goes on only if the destination is an address of this host.
    pub fn for_this_host(self) -> Self {
        const DESTINATION: u32 = 2;
        const ADDRESS_TYPE: u32 = 3;
        const LOCAL: u32 = 2;
        let rule = self.push("fib", |a| {
            a.number(1, REGISTER).number(2, ADDRESS_TYPE).number(3, DESTINATION);
        });
        rule.equal(&LOCAL.to_ne_bytes())
    }

    /// Goes on only if the connection's destination was translated.
    pub fn translated(self) -> Self {
        const STATUS: u32 = 2;
        const DESTINATION_TRANSLATED: u32 = 1 << 5;
        let rule = self.push("ct", |a| {
            a.number(1, REGISTER).number(2, STATUS);
        });
        rule.mask(&DESTINATION_TRANSLATED.to_ne_bytes()).differ(&[0; 4])
    }

    /// Looks the first registers up in a map and loads what it says into them; goes on only if there is something.
    pub fn look_up(self, map: &str) -> Self {
        self.push("lookup", |a| {
            a.name(1, map).number(2, REGISTER).number(3, REGISTER);
        })
    }

    /// Translates the destination to the address in the first registers and the port in `port`.
    pub fn destination(self, family: u8, port: u32) -> Self {
        const DESTINATION: u32 = 1;
        self.push("nat", |a| {
            a.number(1, DESTINATION).number(2, u32::from(family)).number(3, REGISTER).number(5, REGISTER + port);
        })
    }

    /// Translates the source to the host's address.
    pub fn masquerade(self) -> Self {
        self.push("masq", |_| {})
    }

    /// Drops the packet.
    pub fn drop(self) -> Self {
        const DROP: u32 = 0;
        self.push("immediate", |a| {
            a.number(1, VERDICT).nested(2, |data| {
                data.nested(2, |verdict| {
                    verdict.number(1, DROP);
                });
            });
        })
    }

    fn compare(self, operator: u32, value: &[u8]) -> Self {
        self.push("cmp", |a| {
            a.number(1, REGISTER).number(2, operator).nested(3, |data| {
                data.bytes(1, value);
            });
        })
    }

    fn push(mut self, name: &'static str, write: impl FnOnce(&mut Attributes)) -> Self {
        let mut data = Attributes::default();
        write(&mut data);
        self.0.push((name, data));
        self
    }
}
