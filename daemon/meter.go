package daemon

import "time"

// meter turns the raw counters of a removal into progress. The kernel has no
// progress for a removal: what is left falls a block group at a time, which is
// up to 1 GiB, and in between the traffic of the two devices is the only sign
// of life. The meter is fed and read by one goroutine.
type meter struct {
	finished uint64 // bytes of the steps that are done
	total    uint64 // bytes of all steps
	step     uint64 // bytes of the step under way
	done     uint64 // bytes of it that are moved, as shown; never falls

	left          uint64 // Counters.Left of the last sample
	read, written uint64 // counters when left last changed
	started       bool

	rate     float64 // bytes a second, smoothed
	lastTime time.Time
	lastDone uint64
	progress float64
}

// begin starts a step that will move bytes. rest is what the steps after it
// will move.
func (m *meter) begin(bytes, rest uint64, now time.Time) {
	m.step, m.done, m.started = bytes, 0, false
	m.total = m.finished + bytes + rest
	m.lastTime, m.lastDone = now, m.finished
}

// sample takes in one reading of the counters.
func (m *meter) sample(c Counters, now time.Time) {
	if !m.started || c.Left != m.left {
		m.started, m.left, m.read, m.written = true, c.Left, c.Read, c.Written
	}
	var gone uint64
	if c.Left < m.step {
		gone = m.step - c.Left
	}
	// Every byte of a group is read once and written once. Others write to the
	// target too, so the group's own size is the limit.
	within := min((c.Read-m.read+c.Written-m.written)/2, c.Group)
	m.done = max(m.done, min(gone+within, m.step))
	m.smooth(now)
}

// end closes the step under way: all of it has moved.
func (m *meter) end(now time.Time) {
	m.done = m.step
	m.smooth(now)
	m.finished += m.step
	m.step, m.done = 0, 0
}

// smooth updates the rate: a moving average with a time constant of about
// four seconds.
func (m *meter) smooth(now time.Time) {
	elapsed := now.Sub(m.lastTime).Seconds()
	if elapsed < 0.05 {
		return
	}
	current := float64(m.bytes()-min(m.lastDone, m.bytes())) / elapsed
	weight := min(1, elapsed/4)
	if m.rate == 0 {
		weight = 1
	}
	m.rate += weight * (current - m.rate)
	m.lastTime, m.lastDone = now, m.bytes()
}

func (m *meter) bytes() uint64 { return m.finished + m.done }

// almost is the progress of a job that has moved all and is not done yet.
const almost = 0.999

// fraction gives the progress from 0 to almost 1: all of it is said of a job
// only once it is done. It never falls, though the total may grow while the
// user writes.
func (m *meter) fraction() float64 {
	if m.total > 0 {
		m.progress = max(m.progress, min(almost, float64(m.bytes())/float64(m.total)))
	}
	return m.progress
}

// end of the work as it looks at now; zero while it is not known.
func (m *meter) expected(now time.Time) time.Time {
	if m.rate < 1 || m.bytes() >= m.total {
		return time.Time{}
	}
	return now.Add(time.Duration(float64(m.total-m.bytes()) / m.rate * float64(time.Second)))
}
