import { html } from "./html.js";

export function Snapshots() {
  return html``;
}
