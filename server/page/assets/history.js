// What the page has seen of each model, a point for each look: the server keeps no history for it.

const KEPT = 900;
// Between two looks that are further apart than this the line is broken.
const GAP_S = 6;

const ROOMS = ["receive", "wait", "queue", "journal", "step", "publish"];
const known = new Map();

function since(now, before) {
  const count = now.count - before.count;
  return count > 0 ? (now.sum - before.sum) / count : null;
}

class History {
  constructor() {
    this.at = [];
    this.series = {};
    this.last = null;
    this.movedMs = Date.now();
  }

  push(atS, values) {
    this.at.push(atS);
    for (const name of new Set([...Object.keys(this.series), ...Object.keys(values)])) {
      const line = (this.series[name] ??= new Array(this.at.length - 1).fill(null));
      line.push(values[name] ?? null);
      if (line.length > KEPT) line.shift();
    }
    if (this.at.length > KEPT) this.at.shift();
  }

  // One look at `GET /v1/models` or `GET /v1/models/{m}`.
  note(model) {
    const nowS = Date.now() / 1000;
    const before = this.last;
    if (before && nowS - before.atS < 0.2) return;
    this.last = { atS: nowS, model };
    if (!before) return;
    const passedS = nowS - before.atS;
    const moved = model.version - before.model.version;
    if (moved !== 0 || model.timeline !== before.model.timeline) this.movedMs = Date.now();
    if (passedS > GAP_S) this.push(nowS - passedS / 2, {});
    const values = { rate: moved >= 0 ? moved / passedS : null };
    const step = model.last_step;
    if (step && moved !== 0) {
      Object.assign(values, { norm: step.gradient_norm, loss: step.metrics.loss ?? null, lastStaleness: step.staleness });
    }
    if (model.figures) this.noteFigures(values, model.figures, before.model.figures, passedS);
    this.push(nowS, values);
  }

  noteFigures(values, now, before, passedS) {
    now.lr.forEach((lr, group) => {
      values[`lr${group}`] = lr;
    });
    // a server that was started anew counts from 0
    if (!before || now.pushes.applied < before.pushes.applied) return;
    const counted = (pushes) => Object.values(pushes).reduce((sum, count) => sum + count, 0);
    values.applied = (now.pushes.applied - before.pushes.applied) / passedS;
    const all = counted(now.pushes) - counted(before.pushes);
    const refused = Math.max(0, now.refused - before.refused);
    values.others = Math.max(0, all - (now.pushes.applied - before.pushes.applied), refused) / passedS;
    values.staleness = since(now.staleness, before.staleness);
    for (const room of ROOMS) {
      const s = since(now.seconds[room], before.seconds[room]);
      values[room] = s === null ? null : s * 1000;
    }
  }

  latest(name) {
    return this.series[name]?.findLast((value) => value !== null) ?? null;
  }

  now(name) {
    return this.series[name]?.at(-1) ?? null;
  }
}

// By uid: another model of the same name has a history of its own.
export function historyOf(model) {
  if (!known.has(model.uid)) known.set(model.uid, new History());
  return known.get(model.uid);
}

export { ROOMS };
