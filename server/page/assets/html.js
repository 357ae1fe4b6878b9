// The one place that knows where preact lies.
export {
  html, render, useState, useEffect, useLayoutEffect, useRef, useMemo, useCallback,
} from "./vendor/preact-htm.js";
