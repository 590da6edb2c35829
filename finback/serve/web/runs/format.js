// Formats numbers for reading.

/** 75 s as "1:15", hours where there are some. */
export function clock(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const s = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  if (s >= 86400) return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  return s >= 3600
    ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`
    : `${Math.floor(s / 60)}:${two(s % 60)}`;
}

/** Dollars, with as many digits as small sums need. */
export function money(dollars) {
  if (!dollars) return "$0";
  if (dollars < 0.0001) return "< $0.0001";
  return `$${dollars.toFixed(dollars < 0.1 ? 4 : 2)}`;
}

/** What a run or stage has cost, and whether a part of it is unknown. */
export function cost({ money: dollars, unknown }) {
  return unknown.some((text) => text.startsWith("money of ")) ? `${money(dollars)} + unknown` : money(dollars);
}

/** 3 100 672 as "3.10 M". */
export function short(n) {
  const size = Math.abs(n);
  for (const [unit, mark] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (size >= unit) return `${(n / unit).toPrecision(3)} ${mark}`;
  return Number.isInteger(n) ? String(n) : value(n);
}

/** A measured value. */
export function value(n) {
  if (n === null || n === undefined) return "–";
  const size = Math.abs(n);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return n.toExponential(2);
  return Number.isInteger(n) && size < 1e5 ? String(n) : n.toPrecision(4).replace(/\.?0+$/, "");
}

export const percent = (share) => `${(share * 100).toFixed(1)} %`;

/** How long ago something was, in words. */
export function ago(at) {
  const s = Math.max(0, Date.now() / 1000 - at);
  if (s < 90) return "just now";
  if (s < 5400) return `${Math.round(s / 60)} min ago`;
  if (s < 129600) return `${Math.round(s / 3600)} h ago`;
  return `${Math.round(s / 86400)} days ago`;
}

const NAMES = {
  loss: "Loss",
  mtp_loss: "MTP loss",
  reward: "Reward",
  accuracy: "Accuracy",
  length: "Response length",
  entropy: "Entropy",
  kl: "KL to the reference",
  gap_max: "Trainer–engine gap, largest",
  gap_mean: "Trainer–engine gap, mean",
  grad_norm: "Gradient norm",
  lr: "Learning rate",
  tokens_per_second: "Tokens per second",
  mfu: "MFU",
  probe: "Probe accuracy",
  well_formed: "Well formed",
  thinks: "Share that thinks",
  truncated: "Share cut off",
  clip_share: "Share clipped",
  weights_cut: "Share of weights cut",
  answers_masked: "Share of tokens in masked answers",
  max_violation: "Expert load, largest excess",
  idle_experts: "Idle experts",
  balance: "Balance loss",
  groups_with_gradient: "Groups with a gradient",
  seconds: "Seconds a step",
  update_seconds: "Seconds an update",
  generated_per_second: "Tokens generated per second",
  generating_seconds: "Seconds of generating",
  learnt_per_second: "Tokens learnt per second",
  mismatch_kl: "Mismatch KL, engine to trainer",
  mismatch_chi2: "Mismatch chi-square",
  staleness: "Age of tokens (updates), mean",
  staleness_max: "Age of tokens (updates), most",
  versions: "Ages among a step's tokens",
  trainer_idle: "Share that the trainer waits",
  engines_idle: "Share that the engines wait",
  sync_bytes: "Bytes of weights sent",
  sync_seconds: "Seconds until weights are there",
  labels: "Tokens learnt",
  tokens_with_gradient: "Tokens with a gradient",
  answers: "Answers a step",
  memory: "Memory",
};

/** A metric's name in words. */
export const named = (key) => NAMES[key] ?? key.replace(/^reward_/, "Reward: ").replaceAll("_", " ");
