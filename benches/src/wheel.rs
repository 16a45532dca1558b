//! The limit of timers: a hashed hierarchical wheel by hand, its timers linked
//! within one array, waited for by a timerfd.
//!
//! It is what one would write for a single purpose, and so does less than a
//! facility for all must: a timer has a function and a word, nothing that it
//! owns; an index that was kept too long names a newer timer; within a tick of
//! 0.13 ms timers fire in no order.

use std::io;
use std::time::{Duration, Instant};

use crate::sys::{self, Epoll, TimerFd, own_cpu_time};
use crate::timers::{self, Timed};

/// 2^17 ns, 0.13 ms.
const TICK_SHIFT: u32 = 17;
const LEVEL_SHIFT: u32 = 6;
const SLOTS: usize = 1 << LEVEL_SHIFT;
const LEVELS: usize = 6;
const NONE: u32 = u32::MAX;

struct Timer {
    due: u64,
    next: u32,
    previous: u32,
    /// Which list it stands in, for the head to be moved.
    list: u32,
    call: fn(&mut Fired, u64),
    data: u64,
}

/// What the timers of the bench change.
#[derive(Default)]
struct Fired {
    count: usize,
    late: Vec<Duration>,
    start: Option<Instant>,
}

struct Wheel {
    timers: Vec<Timer>,
    free: Vec<u32>,
    heads: [u32; SLOTS * LEVELS],
    /// Which lists have timers, a bit for each.
    taken: [u64; LEVELS],
    tick: u64,
}

impl Wheel {
    fn new() -> Self {
        Self {
            timers: Vec::new(),
            free: Vec::new(),
            heads: [NONE; SLOTS * LEVELS],
            taken: [0; LEVELS],
            tick: 0,
        }
    }

    fn insert(&mut self, due: u64, call: fn(&mut Fired, u64), data: u64) -> u32 {
        let timer = Timer {
            due,
            next: NONE,
            previous: NONE,
            list: NONE,
            call,
            data,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.timers[index as usize] = timer;
                index
            }
            None => {
                self.timers.push(timer);
                self.timers.len() as u32 - 1
            }
        };
        self.link(index);
        index
    }

    fn cancel(&mut self, index: u32) {
        self.unlink(index);
        self.free.push(index);
    }

    fn reset(&mut self, index: u32, due: u64) {
        self.unlink(index);
        self.timers[index as usize].due = due;
        self.link(index);
    }

    fn link(&mut self, index: u32) {
        // Up, so that none fires early.
        let due = self.timers[index as usize].due.div_ceil(1 << TICK_SHIFT);
        let due = due.max(self.tick + 1);
        let distance = (due ^ self.tick) | 1;
        let level = ((63 - distance.leading_zeros()) / LEVEL_SHIFT).min(LEVELS as u32 - 1);
        let slot = (due >> (level * LEVEL_SHIFT)) as usize % SLOTS;
        let list = level as usize * SLOTS + slot;
        let head = self.heads[list];
        let timer = &mut self.timers[index as usize];
        timer.list = list as u32;
        timer.next = head;
        timer.previous = NONE;
        if head != NONE {
            self.timers[head as usize].previous = index;
        }
        self.heads[list] = index;
        self.taken[level as usize] |= 1 << slot;
    }

    fn unlink(&mut self, index: u32) {
        let Timer {
            next,
            previous,
            list,
            ..
        } = self.timers[index as usize];
        if next != NONE {
            self.timers[next as usize].previous = previous;
        }
        if previous == NONE {
            self.heads[list as usize] = next;
            if next == NONE {
                self.taken[list as usize / SLOTS] &= !(1 << (list as usize % SLOTS));
            }
        } else {
            self.timers[previous as usize].next = next;
        }
    }

    /// The first tick at which something is to be done.
    fn next_tick(&self) -> Option<u64> {
        (0..LEVELS).find_map(|level| {
            let shift = level as u32 * LEVEL_SHIFT;
            let now = self.tick >> shift;
            let ahead = self.taken[level] & (u64::MAX << (now % SLOTS as u64));
            (ahead != 0).then(|| {
                let slot = u64::from(ahead.trailing_zeros());
                ((now & !(SLOTS as u64 - 1)) | slot) << shift
            })
        })
    }

    /// Fires what is due by `now`, in nanoseconds.
    fn advance(&mut self, now: u64, fired: &mut Fired) {
        let now = now >> TICK_SHIFT;
        while let Some(tick) = self.next_tick()
            && tick <= now
        {
            self.tick = tick;
            for level in (0..LEVELS).rev() {
                let slot = (tick >> (level as u32 * LEVEL_SHIFT)) as usize % SLOTS;
                let list = level * SLOTS + slot;
                if level > 0 && tick & ((1 << (level as u32 * LEVEL_SHIFT)) - 1) != 0 {
                    continue;
                }
                let mut index = std::mem::replace(&mut self.heads[list], NONE);
                self.taken[level] &= !(1 << slot);
                while index != NONE {
                    let Timer {
                        next,
                        due,
                        call,
                        data,
                        ..
                    } = self.timers[index as usize];
                    if due.div_ceil(1 << TICK_SHIFT) <= tick {
                        self.free.push(index);
                        call(fired, data);
                    } else {
                        self.link(index);
                    }
                    index = next;
                }
            }
        }
        self.tick = self.tick.max(now);
    }
}

pub(crate) fn time(timed: Timed, count: usize) -> io::Result<Vec<f64>> {
    let start = Instant::now();
    let mut wheel = Wheel::new();
    let mut fired = Fired {
        start: Some(start),
        ..Fired::default()
    };
    let ticks = |delay: Duration| delay.as_nanos() as u64;
    let count_one = |fired: &mut Fired, _: u64| fired.count += 1;
    let before = own_cpu_time();
    match timed {
        Timed::Fire => {
            for delay in timers::delays(count) {
                wheel.insert(ticks(delay), count_one, 0);
            }
            run(&mut wheel, &mut fired, start, count)?;
        }
        Timed::Cancel => {
            let all: Vec<_> = timers::far_delays(count)
                .map(|delay| wheel.insert(ticks(delay), count_one, 0))
                .collect();
            for index in all {
                wheel.cancel(index);
            }
        }
        Timed::Pending => {
            for delay in timers::far_delays(count) {
                wheel.insert(ticks(delay), count_one, 0);
            }
            let before = own_cpu_time();
            for delay in timers::far_delays(timers::BESIDE_PENDING) {
                let index = wheel.insert(ticks(delay), count_one, 0);
                wheel.cancel(index);
            }
            return Ok(timers::per_operation(before, timers::BESIDE_PENDING));
        }
        Timed::Reset => {
            let all: Vec<_> = timers::far_delays(count)
                .map(|delay| wheel.insert(ticks(delay), count_one, 0))
                .collect();
            let before = own_cpu_time();
            for (index, delay) in all.into_iter().zip(timers::moved_delays(count)) {
                wheel.reset(index, ticks(delay));
            }
            return Ok(timers::per_operation(before, count));
        }
        Timed::Lateness => {
            for delay in timers::delays(count) {
                let due = ticks(start.elapsed() + delay);
                let note = |fired: &mut Fired, due: u64| {
                    let now = fired.start.map_or(Duration::ZERO, |start| start.elapsed());
                    fired
                        .late
                        .push(now.saturating_sub(Duration::from_nanos(due)));
                    fired.count += 1;
                };
                wheel.insert(due, note, due);
            }
            run(&mut wheel, &mut fired, start, count)?;
            return Ok(timers::lateness(fired.late));
        }
    }
    Ok(timers::per_operation(before, count))
}

fn run(wheel: &mut Wheel, fired: &mut Fired, start: Instant, count: usize) -> io::Result<()> {
    let epoll = Epoll::new()?;
    let alarm = TimerFd::new()?;
    let mut events = Vec::with_capacity(16);
    epoll.add(alarm.raw(), sys::READ, 0)?;
    while fired.count < count {
        wheel.advance(start.elapsed().as_nanos() as u64, fired);
        if let Some(tick) = wheel.next_tick() {
            let at = Duration::from_nanos(tick << TICK_SHIFT);
            alarm.set(at.saturating_sub(start.elapsed()))?;
            epoll.wait(&mut events, -1);
        }
    }
    Ok(())
}
