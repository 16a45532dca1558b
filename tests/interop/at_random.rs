//! Long mixtures of everything, at both ends at once.

use crate::Scenario;
use crate::pair::{Direction, Pair, both_directions};
use crate::peer::Peers;

pub(crate) fn scenarios() -> Vec<Scenario> {
    both_directions("at_random", |peers, direction| {
        for seed in 1..=SEEDS {
            mixture(peers, direction, seed);
        }
    })
    .into()
}

const SEEDS: u64 = 3;
const STEPS: usize = 150;
const FILES: usize = 16;

/// Marsaglia's generator with his shifts: the same numbers in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }

    /// Short mostly, and sometimes more than a read takes.
    fn length(&mut self) -> usize {
        match self.below(10) {
            0 => 1 + self.below(150_000),
            1..3 => 1 + self.below(5_000),
            _ => 1 + self.below(50),
        }
    }
}

/// Writes, descriptors in both forms, pauses and resumes. At the end all bytes
/// and all descriptors are at the other end, in order, and none was late.
fn mixture(peers: &Peers, direction: Direction, seed: u64) {
    // The generator must not begin with few bits.
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    pair.make_files(FILES);
    // Which files went where, and behind how many bytes of ours.
    let mut ours: Vec<(usize, usize)> = Vec::new();
    let mut twisteds = Vec::new();
    let mut expected = 0;
    let mut commands = String::new();
    for _ in 0..STEPS {
        match random.below(12) {
            0..2 => {
                let length = random.length();
                pair.write(length);
            }
            2..4 => {
                let file = random.below(FILES);
                ours.push((file, pair.written()));
                pair.send_file(file);
                pair.write(1 + random.below(3));
            }
            4 => {
                let first = random.below(FILES);
                let files = first..FILES;
                ours.extend(files.clone().map(|file| (file, pair.written())));
                pair.write_with_files(random.length(), files);
            }
            5 => pair.transport().pause_producing(),
            6 => pair.transport().resume_producing(),
            7 => commands += ["pause ", "resume "][random.below(2)],
            8 => {
                let length = random.length();
                expected += length;
                commands += &format!("write={length} ");
            }
            9 => {
                for _ in 0..=random.below(5) {
                    let file = random.below(FILES);
                    twisteds.push(file);
                    expected += 1;
                    commands += &format!("fd={file} write=1 ");
                }
            }
            10 => pair.tell(&std::mem::take(&mut commands)),
            _ => {
                pair.reactor.turn(Some(std::time::Duration::ZERO));
            }
        }
    }
    pair.tell(&format!("{commands} resume write=1"));
    expected += 1;
    pair.transport().resume_producing();
    let written = pair.written();
    pair.wait("all bytes are at both ends", |pair| {
        pair.peer_received() == written && pair.record.data().len() == expected
    });
    pair.tell("lose");
    pair.wait_for_peers_loss();
    pair.wait_for_our_loss();

    pair.assert_received(expected);
    pair.assert_peer_received(written);
    let identities = pair.identities(0..FILES);
    let sent: Vec<_> = ours.iter().map(|(file, _)| &identities[*file]).collect();
    let arrived = pair.peer.told("fd");
    assert!(
        arrived.iter().eq(sent),
        "seed {seed}: other descriptors than ours"
    );
    let sent: Vec<_> = twisteds.iter().map(|file| &identities[*file]).collect();
    let arrived = pair.received_identities();
    assert!(
        arrived.iter().eq(sent),
        "seed {seed}: other descriptors than Twisted's"
    );

    let mut behind = ours.iter().map(|(_, written)| *written);
    let mut received = 0;
    for event in pair.peer.events() {
        if let Some(count) = event.strip_prefix("data ") {
            received += crate::pair::number(count);
        } else if event.starts_with("fd ") {
            let written = behind.next().expect("as many as were sent");
            assert!(
                received <= written,
                "seed {seed}: late, {received} > {written}"
            );
        }
    }
}
