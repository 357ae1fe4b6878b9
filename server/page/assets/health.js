// One word for a model's health, its level for the eye, and a sentence that says why.

import { plural, seconds } from "./words.js";

// Live workers and no new version for so long: something is stuck, or a step takes long.
const STALL_S = 20;

// `movedMs`: when the version was last seen to change, or when it was first seen.
export function health(model, movedMs) {
  if (model.failed) return { level: "bad", word: "Failed", why: `${model.failed} Restore a snapshot.` };
  const nonfinite = model.parameters_nonfinite;
  if (nonfinite.length) {
    const many = nonfinite.length > 1 ? ` and ${nonfinite.length - 1} more` : "";
    return { level: "bad", word: "Diverged", why: `NaN or infinity in ${nonfinite[0]}${many}. Restore a snapshot.` };
  }
  if (!model.workers_live) return { level: "idle", word: "Idle", why: "No worker is here." };
  const quarantined = model.workers_quarantined;
  if (quarantined) {
    return { level: "warn", word: "Attention", why: `${plural(quarantined, "worker")} in quarantine.` };
  }
  const still = (Date.now() - movedMs) / 1000;
  if (still > STALL_S) {
    return { level: "warn", word: "Stalled", why: `No new version for ${seconds(still)}, with ${plural(model.workers_live, "live worker")}.` };
  }
  return { level: "ok", word: "Training", why: `${plural(model.workers_live, "worker")} at work.` };
}

const ORDER = ["bad", "warn", "ok", "idle"];
export const worst = (levels) => ORDER.find((level) => levels.includes(level)) ?? "idle";
